// The page: data in, sections out; with a server behind it, again and again.

const BALANCE = ["max_vio", "max_vio_window", "min_vio", "mean_vio", "cv", "effective_experts", "dead_share",
  "straggler"];
const TRANSPORT = ["transport_share", "sweeps", "column_error", "unconverged", "rerouted", "potential",
  "router_entropy", "top_k_mass", "nonfinite", "slot_fill"];
const POLL_EVERY = 2000;

const at = (id) => document.getElementById(id);
const chosen = { layer: "", metric: "max_vio", run: 0, step: null };
let data = null, frames = [];
const map = new HeatMap(at("map"), at("scale"), at("scale-notes"), at("cell"));

/** Names without the parts that all have in common: "layer 3" of "model.layers.3.mlp.gate". */
function shortNames(names) {
  const parts = names.map((name) => name.split("."));
  if (names.length < 2) return [...names];
  const least = Math.min(...parts.map((one) => one.length)) - 1;
  let front = 0, back = 0;
  while (front < least && parts.every((one) => one[front] === parts[0][front])) front += 1;
  while (back < least - front
    && parts.every((one) => one[one.length - 1 - back] === parts[0][parts[0].length - 1 - back])) back += 1;
  return parts.map((one) => one.slice(front, one.length - back).join("."))
    .map((name) => (/^\d+$/.test(name) ? `layer ${name}` : name));
}

const shortName = (run, layer) => shortNames(run.layers)[run.layers.indexOf(layer)] ?? layer;
const meaning = (metric) => (data.metrics[metric] || "").replaceAll("`", "");

/** Sets a select's options, and keeps what is chosen where it is still there. */
function setOptions(select, options, value) {
  const now = JSON.stringify(options);
  if (select.known !== now) {
    select.replaceChildren(...options.map(([key, text]) => make("option", { value: key }, text)));
    select.known = now;
  }
  select.value = options.some(([key]) => key === value) ? value : options[0]?.[0] ?? "";
  return select.value;
}

function curve(run, values, name, role = {}) {
  return { name, run, x: data.runs[run].windows, y: values, dash: "none", colour: COLOURS[run % COLOURS.length],
    ...role };
}

/** A metric of all runs: of the chosen layer, or the mean over layers and the worst layer. */
function metricCurves(metric) {
  return data.runs.flatMap((run, i) => {
    if (chosen.layer !== "") {
      const values = run.by_layer[metric]?.[run.layers.indexOf(chosen.layer)];
      return values ? [curve(i, values, run.name)] : [];
    }
    const { mean, worst } = run.model[metric];
    if (run.layers.length < 2) return [curve(i, mean, run.name)];
    return [curve(i, mean, `${run.name}, mean`), curve(i, worst, `${run.name}, worst layer`, { dash: "6 4" })];
  });
}

function lossCurves() {
  return data.runs.flatMap((run, i) => [
    curve(i, run.train.loss, `${run.name}, training`, { x: run.train.step }),
    curve(i, run.evaluation.nats_per_token, `${run.name}, held out`, { x: run.evaluation.step, dash: "2 3",
      hollow: true }),
  ]);
}

/** MaxVio as routed beside that of the softmax's own choice. */
function changeCurves() {
  const of = (run, metric) => (chosen.layer === "" ? run.model[metric].mean
    : run.by_layer[metric]?.[run.layers.indexOf(chosen.layer)] ?? []);
  return data.runs.flatMap((run, i) => [
    curve(i, of(run, "max_vio_routed"), `${run.name}, as routed`),
    curve(i, of(run, "max_vio_softmax"), `${run.name}, by softmax`, { dash: "6 4", hollow: false }),
  ]);
}

function drawCharts() {
  const metricChart = (metric, zero = true) => ({ title: metric, note: meaning(metric), zero,
    series: metricCurves(metric) });
  const charts = [["loss", "curves", { title: "Loss", note: "cross-entropy, nats a token", zero: false,
    series: lossCurves() }],
  ["balance", "curves", metricChart(chosen.metric)], ["drop", "curves", metricChart("drop_rate")],
  ["change", "transport", { title: "MaxVio before and after balancing", zero: true, series: changeCurves(),
    note: "max_vio_softmax and max_vio_routed: of the same sampled tokens, mean over layers or the chosen one" }],
  ...TRANSPORT.map((metric) => [metric, "transport", metricChart(metric)])];
  for (const [name, place, chart] of charts) {
    let figure = at(`chart-${name}`);
    if (!figure) at(place).append(figure = make("figure", { id: `chart-${name}` }));
    figure.hidden = name !== "balance" && chart.series.every((one) => !one.y.some(known));
  }
  // All are in their places now, so that each has its width.
  for (const [name, , chart] of charts) if (!at(`chart-${name}`).hidden) drawChart(at(`chart-${name}`), chart);
}

function region(id, label, content) {
  const place = at(id);
  fill(place, { tabindex: 0, role: "region", "aria-label": label }, []);
  place.replaceChildren(content);
}

function drawSummary() {
  const names = data.runs.map((run) => run.name), labels = new Map();
  data.runs.forEach((run, i) => run.summary.forEach(([label, text]) => {
    if (!labels.has(label)) labels.set(label, names.map(() => "–"));
    labels.get(label)[i] = text;
  }));
  const row = (label, texts) => make("tr", {}, make("th", { scope: "row" }, label),
    ...texts.map((text) => make("td", {}, text.replaceAll(" %", "\u00a0%"))));
  region("summary", "Summary", table(["", ...names], [...labels].map(([label, texts]) => row(label, texts))));
  at("compared").hidden = data.runs.length < 2;
  if (data.runs.length < 2) return;
  const rows = data.comparison.map((one) => row(one.figure, [short(one.step), ...one.values]));
  region("comparison", "Comparison", rows.length ? table(["", "step", ...names], rows)
    : make("p", {}, "These runs have no step in common."));
}

function drawAlerts() {
  const several = data.runs.length > 1, entries = data.runs.flatMap((run) => run.alerts.map((one) => [run, one]));
  entries.sort(([, a], [, b]) => (a.over !== null) - (b.over !== null));
  const rows = entries.map(([run, one]) => make("tr", one.over === null ? { class: "open" } : {},
    make("th", { scope: "row" }, one.over === null ? "● open" : `over at ${short(one.over)}`),
    several ? make("td", {}, run.name) : null,
    make("td", {}, one.alert), make("td", { title: one.layer }, shortName(run, one.layer)),
    make("td", {}, short(one.expert)),
    ...[one.since, one.value, one.threshold].map((value) => make("td", {}, short(value))),
    make("td", { class: "advice" }, one.advice ?? "")));
  const head = ["state", ...(several ? ["run"] : []), "alert", "layer", "expert", "since step", "value",
    "threshold", "what to try"];
  region("alerts", "Alerts", rows.length ? table(head, rows) : make("p", {}, "None was raised."));
  at("alerts").classList.toggle("tall", rows.length > 12);
}

/** Indices into the windows of the chosen run at which the slider stops. */
function stops() {
  const run = data.runs[chosen.run];
  return run.frames.places.length ? run.frames.places : run.windows.map((_, i) => i);
}

function drawWindow() {
  const run = data.runs[chosen.run], all = stops(), slider = at("window");
  at("map-part").hidden = !run.frames.places.length;
  at("no-map").hidden = Boolean(run.frames.places.length);
  slider.disabled = !all.length;
  at("layers").hidden = at("table-title").hidden = !all.length;
  if (!all.length) { at("window-text").textContent = "no window was recorded yet"; return; }
  const wanted = chosen.step ?? Infinity;
  let stop = all.findIndex((place) => run.windows[place] >= wanted);
  if (stop < 0) stop = all.length - 1;
  slider.max = all.length - 1;
  slider.value = stop;
  const place = all[stop], last = run.windows[place], steps = run.steps[place];
  const text = `steps ${short(steps ? last - steps + 1 : last)} to ${short(last)} (${stop + 1} of ${all.length})`;
  at("window-text").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  const names = shortNames(run.layers).map((name, i) => [name, run.layers[i]]);
  if (run.frames.places.length) {
    const rows = run.frames.experts.map((_, i) => names[i] ?? [`layer ${i}`, `layer ${i}`]);
    map.show(frames[chosen.run], stop, rows);
  }
  drawLayers(run, place, names, last);
}

function drawLayers(run, place, names, last) {
  const metrics = Object.keys(data.metrics).filter((metric) => run.by_layer[metric]);
  const rows = names.map(([name, full], layer) => make("tr", {}, make("th", { scope: "row", title: full }, name),
    ...metrics.map((metric) => {
      const value = run.by_layer[metric][layer][place];
      return make("td", { "data-metric": metric, title: value ?? "not defined" }, short(value));
    })));
  at("table-title").textContent = `Layers of ${run.name} in the window that ends at step ${short(last)}`;
  const place_ = at("layers"), { scrollLeft, scrollTop } = place_;
  region("layers", "Metrics of each layer",
    table(["layer", ...metrics], rows, ["", ...metrics.map(meaning)]));
  place_.classList.toggle("tall", rows.length > 16);
  Object.assign(place_, { scrollLeft, scrollTop });
}

function drawRest() {
  const names = data.runs.map((run) => run.name);
  at("title").textContent = `Expert load: ${names.join(", ")}`;
  document.title = `Expert load: ${names.join(", ")}`;
  const several = names.length > 1;
  at("notes").replaceChildren(...data.runs.flatMap((run) => run.notes.map((note) =>
    make("li", {}, several ? `${run.name}: ${note}` : note))));
  const configs = JSON.stringify(data.runs.map((run) => [run.name, run.config]));
  if (at("configs").known === configs) return;  // what a reader has opened stays open
  at("configs").known = configs;
  at("meanings").replaceChildren(...Object.keys(data.metrics).flatMap((metric) =>
    [make("dt", {}, metric), make("dd", {}, meaning(metric))]));
  at("configs").replaceChildren(...data.runs.filter((run) => Object.keys(run.config).length).map((run) =>
    make("details", {}, make("summary", {}, `Configuration of ${run.name}`),
      make("pre", {}, JSON.stringify(run.config, null, 2)))));
}

function setControls() {
  const layers = [...new Set(data.runs.flatMap((run) => run.layers))], shown = shortNames(layers);
  chosen.layer = setOptions(at("layer"), [["", "all: mean and worst"], ...layers.map((name, i) => [name, shown[i]])],
    chosen.layer);
  chosen.metric = setOptions(at("metric"), BALANCE.map((metric) => [metric, metric]), chosen.metric);
  const runs = data.runs.map((run, i) => [String(i), run.name]);
  chosen.run = Number(setOptions(at("run"), runs, String(chosen.run)));
  at("run-control").hidden = runs.length < 2;
}

function show(fresh) {
  data = fresh;
  frames = data.runs.map((run) => openFrames(run.frames));
  setControls();
  drawRest();
  drawSummary();
  drawAlerts();
  drawCharts();
  drawWindow();
}

at("layer").addEventListener("change", (event) => { chosen.layer = event.target.value; drawCharts(); });
at("metric").addEventListener("change", (event) => { chosen.metric = event.target.value; drawCharts(); });
at("run").addEventListener("change", (event) => { chosen.run = Number(event.target.value); drawWindow(); });
at("window").addEventListener("input", (event) => {
  const all = stops(), stop = Number(event.target.value);
  // At the end the page follows the run.
  chosen.step = stop === all.length - 1 ? null : data.runs[chosen.run].windows[all[stop]];
  drawWindow();
});
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (!data || window.innerWidth === width) return;
  width = window.innerWidth;
  drawCharts();
  drawWindow();
});

let tag = null;
async function poll() {
  try {
    const answer = await fetch("data.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
    if (answer.status === 200) {
      show(await answer.json());
      tag = answer.headers.get("ETag");
      at("state").textContent = `Live: last change seen at ${new Date().toLocaleTimeString()}.`;
    } else if (answer.status !== 304) {
      throw new Error(`status ${answer.status}`);
    }
  } catch (error) {
    at("state").textContent = `No fresh data (${error.message}). Trying again.`;
    tag = null;
  }
  setTimeout(poll, POLL_EVERY);
}

const embedded = JSON.parse(at("data").textContent);
if (embedded) show(embedded);
else poll();
