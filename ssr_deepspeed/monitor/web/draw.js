"use strict";
// Elements and line charts. Text enters the page as text nodes and attribute values alone.

const SVG = "http://www.w3.org/2000/svg";
// Okabe and Ito's colours, told apart under every common colour-vision deficiency, the darker ones first.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00"];
// Runs differ by their markers too.
const MARKERS = ["M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z", "M-3.2,-3.2h6.4v6.4h-6.4z", "M0,-4.5l4.5,7.5h-9z",
  "M0,-5l5,5l-5,5l-5,-5z", "M0,4.5l4.5,-7.5h-9z", "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z"];

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const makeSvg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const known = (value) => value !== null && value !== undefined;

/** A number with four digits; what is not defined is a dash. */
function short(value) {
  if (!known(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

/** Round numbers between two bounds, about so many. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) found.push(i * step + 0);
  return found;
}

/** Lowest and highest value, with some room above. */
function bounds(values, zero, room) {
  let low = Infinity, high = -Infinity;
  for (const value of values.filter(known)) { low = Math.min(low, value); high = Math.max(high, value); }
  if (zero) { low = Math.min(low, 0); high = Math.max(high, 0); }
  if (high > low) high += (high - low) * room;
  else { high = low + Math.abs(low) * 0.1 + (low === 0 ? 1 : 0); }
  return [low, high];
}

function table(head, rows, titles = []) {
  const cells = head.map((text, i) => make("th", { scope: "col", ...(titles[i] ? { title: titles[i] } : {}) }, text));
  return make("table", {}, make("thead", {}, make("tr", {}, ...cells)), make("tbody", {}, ...rows));
}

function drawSeries(one, x, y, lines) {
  let path = "", pen = "M";
  const places = [];
  one.x.forEach((step, i) => {
    if (!known(one.y[i])) { pen = "M"; return; }
    // A point between gaps is a line of no length, which round ends show.
    path += `${pen}${x(step).toFixed(1)},${y(one.y[i]).toFixed(1)}${pen === "M" ? "h0" : ""}`;
    pen = "L";
    places.push(i);
  });
  lines.append(makeSvg("path", { d: path, fill: "none", stroke: one.colour, "stroke-width": 2,
    "stroke-dasharray": one.dash, "stroke-linejoin": "round", "stroke-linecap": "round" }));
  const every = one.hollow ? 1 : Math.max(1, Math.ceil(places.length / 7));
  const first = (one.run * 2) % every;
  for (let k = places.length > first ? first : 0; k < places.length; k += every) {
    const place = `translate(${x(one.x[places[k]]).toFixed(1)},${y(one.y[places[k]]).toFixed(1)})`;
    lines.append(marker(one, place));
  }
}

function marker(one, place) {
  return makeSvg("path", { d: MARKERS[one.run % MARKERS.length], transform: place, stroke: one.colour,
    "stroke-width": 1.5, fill: one.hollow ? "#fff" : one.colour });
}

function legend(series) {
  return make("div", { class: "legend" }, ...series.map((one) => make("span", {},
    makeSvg("svg", { width: 34, height: 12, "aria-hidden": "true" },
      makeSvg("line", { x1: 0, x2: 34, y1: 6, y2: 6, stroke: one.colour, "stroke-width": 2,
        "stroke-dasharray": one.dash }), marker(one, "translate(17,6)")), one.name)));
}

function inWords(title, series) {
  const parts = series.map((one) => {
    const places = one.x.map((_, i) => i).filter((i) => known(one.y[i]));
    const [a, b] = [places[0], places[places.length - 1]];
    return `${one.name}: ${short(one.y[a])} at step ${one.x[a]}, ${short(one.y[b])} at step ${one.x[b]}`;
  });
  return `${title}. ${parts.join(". ")}.`;
}

/** Draws `chart`, {title, note, series, zero}, into a figure; a series is {name, run, x, y, dash, colour, hollow}. */
function drawChart(figure, chart) {
  figure.chart = chart;
  const series = chart.series.filter((one) => one.y.some(known));
  const caption = make("figcaption", {}, chart.title, chart.note ? make("small", {}, chart.note) : null);
  figure.removeAttribute("tabindex");
  if (!series.length) {
    figure.replaceChildren(caption, make("p", { class: "readout" }, "Not recorded, or not defined in these runs."));
    return;
  }
  const width = Math.max(240, Math.floor(figure.clientWidth)), height = 230;
  const left = 52, right = 12, top = 10, bottom = 38;
  const [x0, x1] = bounds(series.flatMap((one) => one.x), false, 0);
  const [y0, y1] = bounds(series.flatMap((one) => one.y), chart.zero, 0.05);
  const x = (step) => left + (step - x0) / (x1 - x0) * (width - left - right);
  const y = (value) => height - bottom - (value - y0) / (y1 - y0) * (height - top - bottom);
  const picture = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img",
    "aria-label": inWords(chart.title, series) });
  for (const value of ticks(y0, y1, 5)) {
    picture.append(makeSvg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "#e0e0e0" }),
      makeSvg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const step of ticks(x0, x1, Math.max(2, Math.floor(width / 95))).filter(Number.isInteger)) {
    picture.append(makeSvg("line", { x1: x(step), x2: x(step), y1: height - bottom, y2: height - bottom + 4,
      stroke: "#595959" }),
    makeSvg("text", { x: x(step), y: height - bottom + 17, "text-anchor": "middle" }, short(step)));
  }
  picture.append(makeSvg("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom,
    stroke: "#595959" }),
  makeSvg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "optimizer step"));
  series.forEach((one) => drawSeries(one, x, y, picture));
  const cross = makeSvg("line", { y1: top, y2: height - bottom, stroke: "#595959", visibility: "hidden" });
  picture.append(cross);
  const readout = make("p", { class: "readout", "aria-live": "polite" });
  figure.replaceChildren(caption, legend(series), picture, readout);
  figure.tabIndex = 0;
  listen(figure, picture, { series, x, left, right, width, cross, readout });
}

/** Tells the values at the step that the pointer or the arrow keys choose. */
function listen(figure, picture, { series, x, left, right, width, cross, readout }) {
  const steps = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  let place = steps.length;
  const show = (index) => {
    place = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[place];
    cross.setAttribute("x1", x(step));
    cross.setAttribute("x2", x(step));
    cross.setAttribute("visibility", "visible");
    const values = series.filter((one) => one.x.includes(step))
      .map((one) => `${one.name} ${short(one.y[one.x.indexOf(step)])}`);
    readout.textContent = `step ${short(step)}: ${values.join(", ")}`;
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * width;
    let best = 0;
    steps.forEach((step, i) => { if (Math.abs(x(step) - at) < Math.abs(x(steps[best]) - at)) best = i; });
    if (at > left - 10 && at < width - right + 10) show(best);
  });
  figure.onkeydown = (event) => {
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: steps.length - 1 };
    if (event.target !== figure || !(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  };
}
