// A plan, drawn: how much of every state is noise, call by call. Kept plans are drawn behind it.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190, LEFT = 52, RIGHT = 14, TOP = 14, BOTTOM = 36;

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// The share of noise in a state's standard deviation, for data of unit variance: finite where lambda is not.
export function noiseShare(nodes) {
  return nodes.sigma.map((sigma, i) => sigma / Math.hypot(nodes.alpha[i], sigma));
}

function ticks(most, width) {
  const step = [1, 2, 5, 10, 20, 50, 100, 200].find((one) => most / one <= width / 45) ?? 500;
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
}

export function drawPlan(place, now, kept) {
  const WIDTH = Math.max(280, place.clientWidth), all = kept ? [now, kept] : [now];
  const calls = Math.max(...all.map((nodes) => nodes.nfe));
  const x = (i) => LEFT + ((WIDTH - LEFT - RIGHT) * i) / calls;
  const y = (share) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - share);
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  svg.append(element("title", {}, `${now.nfe} calls, from noise to samples`));
  for (const share of [0, 0.5, 1]) {
    svg.append(element("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(share), y2: y(share) }));
    svg.append(element("text", { x: LEFT - 8, y: y(share) + 4, "text-anchor": "end" }, `${share * 100}%`));
  }
  for (const i of ticks(calls, WIDTH)) svg.append(element("text", { x: x(i), y: HEIGHT - BOTTOM + 17, "text-anchor": "middle" }, i));
  const told = WIDTH < 480 ? "noise in the samples, by calls" : "share of noise in the samples, by network calls";
  svg.append(element("text", { x: LEFT, y: HEIGHT - 4 }, told));
  if (kept) svg.append(curve(kept, "kept", x, y));
  svg.append(curve(now, "now", x, y));
  if (kept) {
    svg.append(element("text", { class: "now-name", x: WIDTH - RIGHT - 60, y: TOP + 10, "text-anchor": "end" }, "now"));
    svg.append(element("text", { class: "kept-name", x: WIDTH - RIGHT, y: TOP + 10, "text-anchor": "end" }, "kept"));
  }
  place.replaceChildren(svg);
}

function curve(nodes, kind, x, y) {
  const shares = noiseShare(nodes), group = element("g", {});
  group.append(element("polyline", { class: kind, points: shares.map((share, i) => `${x(i)},${y(share)}`).join(" ") }));
  const radius = nodes.nfe > 40 ? 2 : 3.5;
  shares.forEach((share, i) => group.append(element("circle", { class: kind, cx: x(i), cy: y(share), r: radius })));
  return group;
}
