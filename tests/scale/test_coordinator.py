from __future__ import annotations

import random

import pytest

from fewstep.scale import BlockError, Coordinator


def test_blocks_are_given_in_order_as_many_as_the_depth_one_to_everybody_first():
    work = Coordinator(range(5), depth=2, copies=1)
    work.joined("a")
    work.joined("b")
    assert work.assign(0.0) == [("a", 0), ("b", 1), ("a", 2), ("b", 3)]
    assert work.finished("b", 1, 1.0)
    assert work.assign(1.0) == [("b", 4)]


def test_blocks_of_a_dead_worker_go_to_others_and_only_the_one_it_was_doing_counts_against_it():
    work = Coordinator(range(4), depth=2, copies=1, most_deaths=2)
    for turn in range(2):
        work.joined(turn)
        assert work.assign(0.0) == [(turn, 0), (turn, 1)]
        if turn == 0:
            assert work.died(0) == [0, 1]
    with pytest.raises(BlockError, match="block 0 was given up: 2 workers died"):
        work.died(1)


def test_a_block_survives_any_number_of_deaths_of_workers_that_had_it_waiting():
    work = Coordinator(range(3), depth=2, copies=1, most_deaths=3)
    for turn in range(9):  # every one finishes the first block that is open, none the second
        work.joined(turn)
        given = work.assign(0.0)
        if not given:
            break
        assert work.finished(turn, given[0][1], 1.0)
        if len(given) == 1:
            break
        work.died(turn)
    assert work.done


def test_last_blocks_are_stolen_and_slow_ones_repeated_after_the_patience():
    work = Coordinator(range(5), depth=2, copies=2, patience=2.0)
    work.joined("fast")
    work.joined("slow")
    assert len(work.assign(0.0)) == 4  # slow has 1 and 3
    for time, block in ((1.0, 0), (2.0, 2)):
        assert work.finished("fast", block, time)
        work.assign(time)
    assert work.finished("fast", 4, 3.0)
    assert work.assign(3.0) == [("fast", 3)]  # that slow has not begun
    assert (work.repeated, work.wake(3.0)) == (1, None)
    assert work.finished("fast", 3, 3.5)
    assert work.assign(3.5) == [("fast", 1)]  # begun at 0, with a median of 1
    assert work.finished("fast", 1, 5.0)
    assert (work.done, work.repeated) == (True, 2)
    assert not work.finished("slow", 1, 9.0)  # the second result does not count


def test_nothing_is_repeated_while_the_last_blocks_take_their_usual_time():
    work = Coordinator(range(3), depth=1, copies=2, patience=3.0)
    work.joined("a")
    work.joined("b")
    work.assign(0.0)
    work.finished("a", 0, 1.0)
    assert work.assign(1.0) == [("a", 2)]
    work.finished("a", 2, 2.0)
    assert work.assign(2.0) == []
    assert work.wake(2.0) == pytest.approx(1.0)  # 3 times the median of 1 since 0
    assert work.assign(3.0) == [("a", 1)]
    assert work.assign(99.0) == []  # two have it


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_block_is_kept_once(seed):
    """Random joins, deaths, lost results and finishes in random order: the work ends, and every block has one first result."""
    chance = random.Random(seed)
    blocks = range(chance.randint(1, 60))
    work = Coordinator(
        blocks, depth=chance.randint(1, 3), copies=chance.randint(1, 3), patience=1.0 + chance.random(), most_deaths=10**6
    )
    held: dict[int, list[int]] = {}
    kept: list[int] = []
    now, hired = 0.0, 0
    while not work.done:
        now += chance.random()
        event = chance.random()
        if not held or event < 0.1:
            held[hired] = []
            work.joined(hired)
            hired += 1
        elif event < 0.25:
            worker = chance.choice(list(held))
            work.died(worker)
            del held[worker]
        elif busy := [worker for worker in held if held[worker]]:
            worker = chance.choice(busy)
            block = held[worker].pop(0)
            if event < 0.3:
                work.lost(worker, block)
            elif work.finished(worker, block, now):
                kept.append(block)
        for worker, block in work.assign(now):
            held[worker].append(block)
        assert all(len(mine) == len(set(mine)) for mine in held.values())
    assert sorted(kept) == list(blocks)


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Coordinator([0], depth=0)
