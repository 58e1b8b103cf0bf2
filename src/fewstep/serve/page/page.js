// The page of `fewstep serve`: sliders, a plan, samples side by side. A run is one request; a new one, or Stop, hangs up on the last.

import { drawPlan } from "./plan.js";

const at = (id) => document.getElementById(id);
const PAUSE = 250;
const shown = { card: null, serving: null, run: null, timer: 0, nodes: null, now: null, keptNodes: null };

// ---- asking the server

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function ask(path, details = {}) {
  const token = sessionStorage.getItem("fewstep-token");
  const headers = { ...details.headers, ...(token ? { authorization: `Bearer ${token}` } : {}) };
  const answer = await fetch(path, { ...details, headers });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({ detail: answer.statusText }));
  if (answer.status === 401) at("token-form").hidden = false;
  throw new Refused(answer.status, told.detail);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const name = /^event: (.*)$/m.exec(part), data = /^data: (.*)$/m.exec(part);
      if (name && data) yield [name[1], JSON.parse(data[1])];
    }
  }
}

// ---- what is set

function planWords() {
  if (at("named").value) return { plan: at("named").value };
  return { nfe: Number(at("nfe").value), solver: at("solver").value, grid: at("grid").value, final: at("final").value };
}

function chosenLabel(count) {
  if (!at("number-row").hidden) return at("number").value === "" ? null : Number(at("number").value);
  const value = at("label").value;
  if (value === "") return null;
  return value === "each" ? Array.from({ length: Math.min(count, shown.serving.classes) }, (_, i) => i) : Number(value);
}

function samplesWords() {
  const serving = shown.serving, count = Number(at("count").value);
  const words = { ...planWords(), seed: Number(at("seed").value || 0), count, previews: at("previews").checked ? 1 : 0 };
  const label = serving.classes === null ? null : chosenLabel(count);
  if (label !== null) words.label = label;
  if (serving.prompts) words.prompt = at("prompt").value;
  if (serving.guidance && (label !== null || serving.prompts)) words.guidance = Number(at("guidance").value);
  return words;
}

function title(words, nfe) {
  const plan = words.plan ? `plan ${words.plan}` : `${words.solver}, grid ${words.grid}`;
  return `${plan}, ${nfe} call${nfe === 1 ? "" : "s"}`;
}

function subtitle(words, seconds) {
  const parts = [`seeds ${words.seed} to ${words.seed + words.count - 1}`];
  if (words.label !== undefined) parts.push(Array.isArray(words.label) ? "every class" : `class ${words.label}`);
  if (words.guidance !== undefined && words.guidance !== 1) parts.push(`guidance ${words.guidance}`);
  if (seconds !== null) parts.push(`${seconds.toFixed(seconds < 10 ? 2 : 0)} s`);
  return parts.join(", ");
}

// ---- what is shown

function say(text, bad = false) {
  at("status").textContent = text;
  at("status").className = bad ? "bad" : "";
}

function made(name, className, text = "") {
  const one = document.createElement(name);
  one.className = className;
  one.textContent = text;
  return one;
}

function newCard() {
  const card = made("article", "card"), head = made("header", ""), words = made("div", "");
  words.append(made("h2", "", ""), made("p", "", ""));
  head.append(words);
  const bar = made("div", "bar");
  bar.append(made("i", ""));
  card.append(head, bar, made("div", "grid"));
  return card;
}

function fill(card, told) {
  const grid = card.querySelector(".grid");
  if (!told.images) {
    const link = made("a", "", "samples.npy");
    link.href = URL.createObjectURL(new Blob([Uint8Array.from(atob(told.npy), (c) => c.charCodeAt(0))]));
    link.download = "samples.npy";
    grid.replaceChildren(link);
    return;
  }
  const columns = Math.ceil(Math.sqrt(told.images.length));
  grid.style.gridTemplateColumns = `repeat(${columns}, minmax(0, ${columns < 3 ? "14rem" : "1fr"}))`;
  while (grid.children.length > told.images.length) grid.lastChild.remove();
  told.images.forEach((image, i) => {
    const picture = grid.children[i] ?? grid.appendChild(made("img", shown.serving.shape[2] >= 96 ? "large" : ""));
    picture.src = `data:image/png;base64,${image}`;
    picture.alt = told.seeds ? `sample of seed ${told.seeds[i]}` : "on the way";
  });
}

function busy(is) {
  at("stop").disabled = !is;
  at("keep").disabled = is || shown.card === null || !shown.now;
}

async function showPlan() {
  const query = new URLSearchParams(planWords());
  shown.nodes = await (await ask(`plan?${query}`)).json();
  drawPlan(at("chart"), shown.nodes, shown.keptNodes);
}

// ---- a run

function stop() {
  clearTimeout(shown.timer);
  shown.run?.abort();
  shown.run = null;
  busy(false);
}

async function run() {
  stop();
  const own = new AbortController(), began = performance.now(), words = samplesWords();
  shown.run = own;
  busy(true);
  document.body.dataset.state = "running";
  say("Waiting for the server.");
  try {
    await showPlan();
    const details = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(words), signal: own.signal };
    const answer = await ask("samples/stream", details);
    const card = (shown.card ??= at("cards").insertBefore(newCard(), at("cards").firstChild));
    const bar = card.querySelector(".bar i");
    for await (const [name, told] of events(answer)) {
      if (shown.run !== own) return;
      if (name === "accepted") {
        card.querySelector("h2").textContent = title(words, told.nfe);
        card.querySelector("p").textContent = subtitle(words, null);
        bar.style.width = "2%";
      } else if (name === "preview") {
        bar.style.width = `${(100 * told.call) / told.nfe}%`;
        say(`Call ${told.call} of ${told.nfe}.`);
        fill(card, told);
      } else if (name === "failed") throw new Refused(told.status, told.detail);
      else if (name === "done") finished(card, bar, words, told, (performance.now() - began) / 1000);
    }
  } catch (error) {
    if (shown.run !== own || error.name === "AbortError") return;
    say(error instanceof Refused ? error.message : "The server cannot be reached.", true);
    document.body.dataset.state = "failed";
  } finally {
    if (shown.run === own) {
      shown.run = null;
      busy(false);
    }
  }
}

function finished(card, bar, words, told, seconds) {
  bar.style.width = "100%";
  fill(card, told);
  card.querySelector("p").textContent = subtitle(words, seconds);
  shown.now = shown.nodes;
  say(`${told.seeds.length} sample${told.seeds.length === 1 ? "" : "s"} in ${told.nfe} calls each.`);
  document.body.dataset.state = "done";
  document.body.dataset.runs = Number(document.body.dataset.runs ?? 0) + 1;
}

function later() {
  clearTimeout(shown.timer);
  shown.timer = setTimeout(run, PAUSE);
}

function keep() {
  shown.card.classList.add("kept");
  const drop = made("button", "", "Drop");
  drop.type = "button";
  const card = shown.card, nodes = shown.now;
  drop.addEventListener("click", () => {
    card.remove();
    if (shown.keptNodes === nodes) shown.keptNodes = null;
    if (shown.nodes) drawPlan(at("chart"), shown.nodes, shown.keptNodes);
  });
  card.querySelector("header").append(drop);
  shown.keptNodes = nodes;
  shown.card = shown.now = null;
  drawPlan(at("chart"), shown.nodes, shown.keptNodes);
  busy(false);
  say("Kept. Change something, and compare.");
}

// ---- the start

function options(select, values, names = values) {
  select.replaceChildren(...values.map((value, i) => new Option(names[i], value)));
}

function values() {
  for (const id of ["nfe", "count", "guidance"]) at(`${id}-value`).textContent = at(id).value;
  at("guidance-value").textContent = at("guidance").value === "1" ? "none" : at("guidance").value;
  const named = Boolean(at("named").value);
  for (const id of ["nfe", "solver", "grid", "final"]) {
    at(id).disabled = named;
    at(id).closest("label")?.classList.toggle("off", named);
  }
}

function setUp(serving) {
  shown.serving = serving;
  at("about").textContent = `${serving.name}, samples of ${serving.shape.join(" × ")}`;
  document.title = `fewstep: ${serving.name}`;
  options(at("solver"), serving.solvers);
  options(at("grid"), serving.grids);
  at("solver").value = at("grid").value = "auto";
  at("nfe").max = Math.min(50, serving.limits.calls);
  at("count").max = Math.min(64, serving.limits.samples);
  const plans = Object.entries(serving.plans);
  options(at("named"), ["", ...plans.map(([name]) => name)], ["from the settings below", ...plans.map(([name, nfe]) => `${name} (${nfe} calls)`)]);
  at("named-row").hidden = plans.length === 0;
  at("condition-fields").hidden = serving.classes === null && !serving.prompts;
  at("prompt-row").hidden = !serving.prompts;
  at("guidance-row").hidden = !serving.guidance;
  if (serving.classes !== null && serving.classes <= 100) {
    const all = Array.from({ length: serving.classes }, (_, i) => String(i));
    const none = serving.needs_class ? [[], []] : [[""], ["any"]];
    options(at("label"), [...none[0], "each", ...all], [...none[1], "each in turn", ...all]);
    at("label").value = "each";
    at("label-row").hidden = false;
  } else if (serving.classes !== null) {
    at("number").max = serving.classes - 1;
    if (serving.needs_class) at("number").value = 0;
    at("number-row").hidden = false;
  }
  values();
}

async function start() {
  try {
    setUp(await (await ask("model")).json());
    at("token-form").hidden = true;
  } catch (error) {
    say(error instanceof Refused ? error.message : "The server cannot be reached.", true);
    return;
  }
  if (shown.serving.prompts) {
    say("Write a prompt.");
    showPlan();
  } else run();
}

at("controls").addEventListener("input", (event) => {
  values();
  if (event.target.id === "prompt" || event.target.id === "previews") return;
  if (shown.serving) later();
});
at("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  if (shown.serving) run();
});
at("next").addEventListener("click", () => {
  at("seed").value = Number(at("seed").value || 0) + Number(at("count").value);
  run();
});
at("stop").addEventListener("click", () => {
  stop();
  say("Stopped.");
  document.body.dataset.state = "stopped";
});
at("keep").addEventListener("click", keep);
new ResizeObserver(() => {
  if (shown.nodes) drawPlan(at("chart"), shown.nodes, shown.keptNodes);
}).observe(at("plan"));
at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("fewstep-token", at("token").value);
  start();
});
start();
