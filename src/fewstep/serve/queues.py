r"""Which queue does the single server work for in the next slot?

There are K queues of backlogs $Q_i(t)$. In slot t a policy chooses one queue a, and sees $S_a(t)$, what the server did for it. *Max-weight*
takes the largest $Q_i S_i$, which keeps every system stable that can be (Tassiulas and Ephremides, "Stability properties of
constrained queueing systems", 1992), but needs to know the $S_i(t)$ of all queues beforehand. *SoftMW* and *SSMW* ("Queue Scheduling
with Adversarial Bandit Learning", arXiv 2303.01745) know nothing, and treat $Q_i(t) S_i(t)$ as the unknown reward of arm i of a bandit
whose rewards grow with the queues: EXP3.S with a scale that follows the longest queue, or exponential weights of the rewards of the
last W slots, so that rates may drift. The idea is the paper's; the constants here are ours:

- with q the longest backlog, M a slowly forgotten maximum of the services seen, and K the number of queues that are not empty,
  $\eta = \sqrt{\ln K / (K V)} / M$, where $V = \min(\sum_{s \le t} q_s^2,\, W q^2)$ for SoftMW and $V = W q^2$ for SSMW;
- the probability of queue i is $p_i = (1 - \gamma) x_i + \gamma / K$ with $\gamma = \min(1/2,\, K \eta q M)$, so that the exponents
  below are at most 1 once $\gamma < 1/2$; before that SoftMW's are cut at 1;
- the estimated reward of the chosen queue is $g = Q_a S_a / p_a$, and 0 of the others;
- SoftMW: $x_a \leftarrow x_a e^{\eta g}$ with the $\eta$ of its slot, normalised, then a fixed share, $x \leftarrow (1 - 1/W) x + 1/(W K)$;
  SSMW: $x$ is the softmax of $\eta$ times the sums of g over the last W slots.

A share that shrinks as 1/t, which suits rates that do not drift, loses queues whose rates do. An empty queue has reward 0 for
certain, so only those with work are drawn from. Choices do not change if backlogs and services are measured in another unit.

What comes in may come late: `choose` returns a `Choice`, and `observe` takes it back with the service it led to.
"""

from __future__ import annotations

import abc
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["SSMW", "Choice", "LongestQueue", "MaxWeight", "Policy", "Queue", "SoftMW", "Uniform"]


class Queue(NamedTuple):
    """One queue, before a slot.

    Attributes:
        backlog: Q, at least 0.
        service: what it would get if chosen, S in the unit of Q, where that is known.
    """

    backlog: float
    service: float = 0.0


class Choice(NamedTuple):
    """A queue that was chosen, with what is needed to learn from it.

    Attributes:
        kind: name of the queue.
        backlog: Q then.
        probability: with which it was chosen.
        scale: eta M of the slot.
    """

    kind: str
    backlog: float
    probability: float = 1.0
    scale: float = 0.0


class Policy(abc.ABC):
    """Chooses a queue for every slot. Not for several threads."""

    @abc.abstractmethod
    def choose(self, queues: Mapping[str, Queue]) -> Choice:
        """The queue that gets the next slot; never an empty one.

        Raises:
            ValueError: if all are empty.
        """

    def observe(self, choice: Choice, service: float) -> None:  # noqa: B027  most learn nothing
        """What the server did for the chosen queue in that slot, in the unit of the backlogs."""


def waiting(queues: Mapping[str, Queue]) -> dict[str, float]:
    """Backlogs of the queues that have some.

    Raises:
        ValueError: if none has.
    """
    found = {kind: queue.backlog for kind, queue in queues.items() if queue.backlog > 0.0}
    if not found:
        raise ValueError("all queues are empty: there is nothing to choose.")
    return found


def largest(queues: Mapping[str, Queue], weight: Callable[[Queue], float]) -> Choice:
    """Of the queues with work, the one of the largest weight, the first of several."""
    found = waiting(queues)
    kind = max(found, key=lambda name: weight(queues[name]))
    return Choice(kind, found[kind])


class MaxWeight(Policy):
    """The queue of the largest Q S, for services that are known before they happen.

    Example:
        >>> MaxWeight().choose({"short": Queue(3.0, 1.0), "long": Queue(5.0, 0.5)}).kind
        'short'
    """

    def choose(self, queues: Mapping[str, Queue]) -> Choice:
        return largest(queues, lambda queue: queue.backlog * queue.service)


class LongestQueue(Policy):
    """The longest queue, however slowly it is served: a baseline, and seldom a good one.

    Example:
        >>> LongestQueue().choose({"short": Queue(3.0, 1.0), "long": Queue(5.0, 0.5)}).kind
        'long'
    """

    def choose(self, queues: Mapping[str, Queue]) -> Choice:
        return largest(queues, lambda queue: queue.backlog)


class Uniform(Policy):
    """Any queue that has work, all equally likely: a baseline.

    Args:
        seed: of the draws.

    Example:
        >>> Uniform().choose({"short": Queue(0.0), "long": Queue(5.0)}).kind
        'long'
    """

    def __init__(self, seed: int = 0):
        self._draws = random.Random(seed)

    def choose(self, queues: Mapping[str, Queue]) -> Choice:
        found = waiting(queues)
        kind = self._draws.choice(list(found))
        return Choice(kind, found[kind], 1.0 / len(found))


class _Soft(Policy):
    """What SoftMW and SSMW share: the scales and the draw."""

    def __init__(self, window: int = 2000, seed: int = 0):
        if window < 1:
            raise ValueError(f"window is a number of slots of at least 1, got {window}.")
        self.window = window
        self._draws = random.Random(seed)
        self._most = 0.0  # M
        self._slot = 0
        self._seen: dict[str, int] = {}

    def _scale(self, found: Mapping[str, float]) -> float:
        """Eta M, and the memory of q."""
        raise NotImplementedError

    def _weights(self, found: Mapping[str, float], scale: float) -> dict[str, float]:
        """X of the queues with work, which sum to 1."""
        raise NotImplementedError

    def _forget(self, kind: str) -> None:
        raise NotImplementedError

    def choose(self, queues: Mapping[str, Queue]) -> Choice:
        found = waiting(queues)
        self._slot += 1
        self._seen.update(dict.fromkeys(found, self._slot))
        if self._slot % self.window == 0:
            self._forget_the_absent()
        scale = self._scale(found)
        explore = min(0.5, len(found) * scale * max(found.values()))
        x = self._weights(found, scale)
        draw, chosen, p = self._draws.random(), "", 1.0
        for chosen in found:
            p = (1.0 - explore) * x[chosen] + explore / len(found)
            draw -= p
            if draw < 0.0:
                break
        return Choice(chosen, found[chosen], p, scale)

    def observe(self, choice: Choice, service: float) -> None:
        if not (math.isfinite(service) and service >= 0.0):
            raise ValueError(f"a service is finite and at least 0, got {service}.")
        self._most = max(service, self._most * (1.0 - 1.0 / self.window))
        self._learn(choice, choice.backlog * service / choice.probability)

    @abc.abstractmethod
    def _learn(self, choice: Choice, reward: float) -> None:
        """The estimated reward g."""

    def _forget_the_absent(self) -> None:
        """Queues that were empty for a whole window are as good as new."""
        for kind in [kind for kind, slot in self._seen.items() if slot <= self._slot - self.window]:
            del self._seen[kind]
            self._forget(kind)


class SoftMW(_Soft):
    """SoftMaxWeight with a fixed share; see the module.

    Args:
        window: W, slots in which rates hardly change. 2000 is ours.
        seed: of the draws.

    Raises:
        ValueError: for a window below 1.

    Example:
        >>> policy = SoftMW(window=100)
        >>> for _ in range(300):
        ...     choice = policy.choose({"slow": Queue(5.0), "fast": Queue(5.0)})
        ...     policy.observe(choice, {"slow": 0.1, "fast": 1.0}[choice.kind])
        >>> policy.weights["fast"] > 0.9
        True
    """

    def __init__(self, window: int = 2000, seed: int = 0):
        super().__init__(window, seed)
        self.weights: dict[str, float] = {}
        self._squares = 0.0

    def _scale(self, found: Mapping[str, float]) -> float:
        longest, K = max(found.values()), len(found)
        self._squares += longest**2
        return math.sqrt(math.log(K) / (K * min(self._squares, self.window * longest**2)))

    def _weights(self, found: Mapping[str, float], scale: float) -> dict[str, float]:
        for kind in found:
            if kind not in self.weights:
                self.weights[kind] = sum(self.weights.values()) / len(self.weights) if self.weights else 1.0
        total = sum(self.weights[kind] for kind in found)
        return {kind: self.weights[kind] / total for kind in found}

    def _learn(self, choice: Choice, reward: float) -> None:
        if choice.kind not in self.weights:  # forgotten in the meantime
            return
        if reward:
            self.weights[choice.kind] *= math.exp(min(1.0, choice.scale * reward / self._most))
        total, K = sum(self.weights.values()), len(self.weights)
        keep = (1.0 - 1.0 / self.window) / total
        self.weights = {kind: keep * x + 1.0 / (self.window * K) for kind, x in self.weights.items()}

    def _forget(self, kind: str) -> None:
        self.weights.pop(kind, None)


class SSMW(_Soft):
    """Sliding-window SoftMaxWeight; see the module.

    Args:
        window: W, slots in which rates hardly change. 2000 is ours.
        seed: of the draws.

    Raises:
        ValueError: for a window below 1.

    Example:
        >>> policy = SSMW(window=100)
        >>> kinds = []
        >>> for slot in range(600):  # after 300 slots the other queue is the fast one
        ...     choice = policy.choose({"a": Queue(5.0), "b": Queue(5.0)})
        ...     policy.observe(choice, 1.0 if (choice.kind == "a") == (slot < 300) else 0.1)
        ...     kinds.append(choice.kind)
        >>> kinds[200:300].count("a") > 75, kinds[500:].count("b") > 75
        (True, True)
    """

    def __init__(self, window: int = 2000, seed: int = 0):
        super().__init__(window, seed)
        self._rewards: deque[tuple[str, float]] = deque()
        self._sums: dict[str, float] = {}

    def _scale(self, found: Mapping[str, float]) -> float:
        return math.sqrt(math.log(len(found)) / (len(found) * self.window)) / max(found.values())

    def _weights(self, found: Mapping[str, float], scale: float) -> dict[str, float]:
        rate = scale / self._most if self._most else 0.0  # eta, with the M of now
        exponents = {kind: rate * self._sums.get(kind, 0.0) for kind in found}
        highest = max(exponents.values())
        raised = {kind: math.exp(value - highest) for kind, value in exponents.items()}
        total = sum(raised.values())
        return {kind: value / total for kind, value in raised.items()}

    def _learn(self, choice: Choice, reward: float) -> None:
        self._rewards.append((choice.kind, reward))
        self._sums[choice.kind] = self._sums.get(choice.kind, 0.0) + reward
        if len(self._rewards) > self.window:
            kind, gone = self._rewards.popleft()
            self._sums[kind] = self._sums.get(kind, 0.0) - gone
        if self._slot % self.window == 0:  # differences gather rounding
            self._sums = {}
            for kind, value in self._rewards:
                self._sums[kind] = self._sums.get(kind, 0.0) + value

    def _forget(self, kind: str) -> None:
        """Nothing: what is older than the window is gone by itself."""
