// The heat map: layers by experts, one window at a time.

// The colour map cividis, from navy over grey to yellow, in 32 steps.
const CIVIDIS = ("00224e 00285b 002e6a 053371 1a386f 273e6e 32436d 3b496c 434e6c 4b546c 535a6d "
  + "5a5f6e 61656f 686a71 6f7073 767676 7d7c78 848279 8c8878 938e78 9b9476 a39a74 "
  + "aba072 b4a76f bcae6c c4b468 cdbb63 d5c25e dec958 e7d150 f0d846 f9e03a fee838")
  .split(" ").map((text) => [0, 2, 4].map((i) => parseInt(text.slice(i, i + 2), 16)));
const UNKNOWN = 65535, DEAD = 0.01, MISSING = "#d9d9d9";
// The brightest colour is of this load and all above, so that the middle one is of an even load, in every run.
const TOP = 2;
// Room above the first row for half a label, in pixels.
const ABOVE = 8;

function cividis(share) {
  const at = Math.max(0, Math.min(1, share)) * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const parts = CIVIDIS[low].map((a, i) => Math.round(a + (CIVIDIS[low + 1][i] - a) * (at - low)));
  return `rgb(${parts.join(",")})`;
}

/** The frames of a run with a function that looks up one load. */
function openFrames(frames) {
  const bytes = Uint8Array.from(atob(frames.loads), (letter) => letter.charCodeAt(0));
  const loads = new Uint16Array(bytes.buffer);
  const starts = [];
  let size = 0;
  for (const experts of frames.experts) { starts.push(size); size += experts; }
  return { ...frames, width: Math.max(0, ...frames.experts), load(frame, layer, expert) {
    const whole = loads[frame * size + starts[layer] + expert];
    return expert >= frames.experts[layer] || whole === UNKNOWN ? null : whole / frames.scale;
  } };
}

class HeatMap {
  constructor(canvas, scale, notes, readout) {
    Object.assign(this, { canvas, scale, readout, cell: [0, 0], frame: 0, frames: null });
    this.drawScale();
    notes.textContent = `yellow: ${TOP} or more; white or ×: dead, below ${DEAD}; grey: not known`;
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => this.point(event));
    canvas.addEventListener("keydown", (event) => this.press(event));
  }

  /** Show a frame; `names` are the layers' short and full ones. */
  show(frames, frame, names) {
    Object.assign(this, { frames, frame, names });
    this.cell = [Math.min(this.cell[0], frames.experts.length - 1), this.cell[1]];
    this.cell[1] = Math.min(this.cell[1], frames.experts[this.cell[0]] - 1);
    this.draw();
  }

  draw() {
    const { canvas, frames } = this, rows = frames.experts.length, width = canvas.parentElement.clientWidth;
    const context = canvas.getContext("2d");
    context.font = "12px system-ui, sans-serif";
    const label = Math.max(...this.names.map(([name]) => context.measureText(name).width));
    this.left = Math.min(Math.ceil(label) + 10, Math.floor(width / 3));
    this.high = Math.max(6, Math.min(26, Math.floor(576 / rows)));
    this.wide = Math.min(56, (width - this.left - 2) / frames.width);
    this.height = ABOVE + rows * this.high;
    const ratio = window.devicePixelRatio || 1, height = this.height + 36;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.height = `${height}px`;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    for (let layer = 0; layer < rows; layer += 1) {
      for (let expert = 0; expert < frames.experts[layer]; expert += 1) this.paint(context, layer, expert);
    }
    this.axes(context);
    this.outline(context);
    this.tell();
  }

  paint(context, layer, expert) {
    const load = this.frames.load(this.frame, layer, expert);
    const gap = Math.min(this.wide, this.high) >= 10 ? 1 : 0;
    const x = this.left + expert * this.wide, y = ABOVE + layer * this.high;
    const crossed = load !== null && load < DEAD && this.wide >= 8 && this.high >= 8;
    context.fillStyle = load === null ? MISSING : load < DEAD && !crossed ? "#fff" : cividis(load / TOP);
    // Without gaps the next cell covers what is half a pixel too wide.
    context.fillRect(x, y, this.wide + (gap ? -gap : 0.5), this.high - gap);
    if (!crossed) return;
    const [a, b, r] = [x + (this.wide - gap) / 2, y + (this.high - gap) / 2, 3];
    context.strokeStyle = "#fff";
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(a - r, b - r); context.lineTo(a + r, b + r);
    context.moveTo(a - r, b + r); context.lineTo(a + r, b - r);
    context.stroke();
  }

  axes(context) {
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = "#404040";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(14 / this.high);
    this.names.forEach(([name], layer) => {
      if (layer % every === 0) context.fillText(name, this.left - 6, ABOVE + (layer + 0.5) * this.high, this.left - 6);
    });
    context.textAlign = "center";
    const step = [1, 2, 4, 8, 16, 32, 64, 128, 256].find((n) => n * this.wide >= 26) || 512;
    for (let expert = 0; expert < this.frames.width; expert += step) {
      context.fillText(String(expert), this.left + (expert + 0.5) * this.wide, this.height + 10);
    }
    context.fillText("expert", this.left + this.frames.width * this.wide / 2, this.height + 27);
  }

  outline(context) {
    const [layer, expert] = this.cell;
    const box = [this.left + expert * this.wide, ABOVE + layer * this.high, Math.max(4, this.wide), this.high];
    context.lineWidth = 4;
    context.strokeStyle = "#fff";
    context.strokeRect(...box);
    context.lineWidth = 2;
    context.strokeStyle = "#D55E00";
    context.strokeRect(...box);
  }

  tell() {
    const [layer, expert] = this.cell, load = this.frames.load(this.frame, layer, expert);
    const what = load === null ? "not known" : `${short(load)} times the mean${load < DEAD ? " (dead)" : ""}`;
    const [name, full] = this.names[layer];
    this.readout.textContent = `${name}${name === full ? "" : ` (${full})`}, expert ${expert}: load ${what}`;
    this.canvas.setAttribute("aria-label",
      `Load of ${this.frames.experts.length} layers' experts over their mean. ${this.readout.textContent}`);
  }

  point(event) {
    if (!this.frames) return;
    const box = this.canvas.getBoundingClientRect();
    const layer = Math.floor((event.clientY - box.top - ABOVE) / this.high);
    const expert = Math.floor((event.clientX - box.left - this.left) / this.wide);
    this.move(layer, expert);
  }

  press(event) {
    const [layer, expert] = this.cell, last = this.frames.experts[layer] - 1;
    const moves = { ArrowLeft: [layer, expert - 1], ArrowRight: [layer, expert + 1], ArrowUp: [layer - 1, expert],
      ArrowDown: [layer + 1, expert], Home: [layer, 0], End: [layer, last] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.move(...moves[event.key]);
  }

  move(layer, expert) {
    const inside = layer >= 0 && expert >= 0 && expert < (this.frames.experts[layer] ?? 0);
    if (!inside || (layer === this.cell[0] && expert === this.cell[1])) return;
    this.cell = [layer, expert];
    this.draw();
  }

  /** The legend of the colours. */
  drawScale() {
    const context = this.scale.getContext("2d"), ratio = window.devicePixelRatio || 1, width = 220;
    this.scale.width = 240 * ratio;
    this.scale.height = 34 * ratio;
    context.setTransform(ratio, 0, 0, ratio, 10, 0);
    for (let x = 0; x < width; x += 1) {
      context.fillStyle = cividis(x / width);
      context.fillRect(x, 0, 1.5, 14);
    }
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = "#404040";
    context.textAlign = "center";
    for (const load of [0, TOP / 2, TOP]) context.fillText(String(load), load / TOP * width, 29);
    this.scale.setAttribute("aria-label", `Colours from 0, navy, over 1, grey, to ${TOP}, yellow`);
  }
}
