/**
 * A chart of the last minutes that glides along: a canvas, its points, and nothing else.
 *
 *     const chart = new Chart(canvas, {
 *       series: [{ name: "system", colour: "--indigo" }, { name: "user", colour: "--indigo-soft" }],
 *       stacked: true,
 *       top: 100,                      // or `least: 10`: a round number above what is shown, and no less than this
 *       say: (value) => `${value} %`,  // how a value reads on the axis and under the pointer
 *     });
 *     chart.add(at, [12.5, 3]);        // `at` in milliseconds; one value for each series
 */

/** Milliseconds: what a chart shows, and how long a silence has to be to be shown as a hole. */
export const SPAN = 120_000;
const HOLE = 3_500;

/** CSS pixels around the plot: room for the axis on the left and the times below. */
const LEFT = 58;
const RIGHT = 8;
const ABOVE = 10;
const BELOW = 24;

const still = window.matchMedia("(prefers-reduced-motion: reduce)");
const dark = window.matchMedia("(prefers-color-scheme: dark)");

export class Chart {
  #canvas;
  #context;
  #series;
  #stacked;
  #fixedTop;
  #least;
  #say;
  #tip;
  #points = []; // { at, values }, oldest first
  #clock = 0; // what to add to performance.now() for the time of the points
  #top = 1;
  #width = 0;
  #height = 0;
  #pointer = null; // CSS pixels from the left, while the pointer is over the plot
  #drawn = ""; // what the last picture depended on

  constructor(canvas, { series, say, stacked = false, top = null, least = 1 }) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#series = series;
    this.#stacked = stacked;
    this.#fixedTop = top;
    this.#least = least;
    this.#say = say;
    this.#tip = document.createElement("div");
    this.#tip.className = "tip";
    this.#tip.hidden = true;
    canvas.after(this.#tip);
    canvas.addEventListener("pointermove", (event) => this.#point(event.offsetX));
    canvas.addEventListener("pointerdown", (event) => this.#point(event.offsetX));
    canvas.addEventListener("pointerleave", () => this.#point(null));
    new ResizeObserver(() => this.#resize()).observe(canvas);
    dark.addEventListener("change", () => (this.#drawn = ""));
    const frame = () => {
      this.#draw();
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  /** The top of the scale where it does not change by itself. */
  set top(value) {
    this.#fixedTop = value;
  }

  /** Adds the newest point. A point that is not newer than the last is passed over. */
  add(at, values) {
    const last = this.#points.at(-1);
    if (last && at <= last.at) return;
    this.#points.push({ at, values });
    while (this.#points[0].at < at - SPAN - 2 * HOLE) this.#points.shift();
    this.#clock = at - performance.now();
    this.#canvas.dataset.points = this.#points.length;
    this.#drawn = "";
  }

  /** Fills in points of the past, where there are none yet. */
  fill(points) {
    const all = new Map([...points, ...this.#points].map((point) => [point.at, point]));
    this.#points = [];
    for (const { at, values } of [...all.values()].sort((one, other) => one.at - other.at)) this.add(at, values);
  }

  #resize() {
    const scale = window.devicePixelRatio || 1;
    this.#width = this.#canvas.clientWidth;
    this.#height = this.#canvas.clientHeight;
    this.#canvas.width = Math.round(this.#width * scale);
    this.#canvas.height = Math.round(this.#height * scale);
    this.#context.setTransform(scale, 0, 0, scale, 0, 0);
    this.#drawn = "";
    this.#draw();
  }

  #point(x) {
    this.#pointer = x !== null && x >= LEFT && x <= this.#width - RIGHT ? x : null;
    this.#drawn = "";
  }

  /** The time at the right edge. It lags a second behind, so that the newest point glides in instead of appearing. */
  #now() {
    const last = this.#points.at(-1);
    if (!last || still.matches) return last?.at ?? 0;
    return Math.min(this.#clock + performance.now() - 1_000, last.at);
  }

  #draw() {
    if (!this.#width || document.hidden) return;
    const now = this.#now();
    const goal = this.#fixedTop ?? round(Math.max(this.#least, this.#highest(now)));
    // The scale follows within some frames; a jump would look like a jump of the figures.
    this.#top = still.matches || Math.abs(goal - this.#top) < goal / 200 ? goal : this.#top + (goal - this.#top) / 6;
    // Nothing is drawn while nothing has moved by half a pixel of the screen: a chart of two minutes moves slowly.
    const moved = Math.round((now / SPAN) * (this.#width - LEFT - RIGHT) * (window.devicePixelRatio || 1) * 2);
    const picture = `${moved} ${this.#top}`;
    if (picture === this.#drawn) return;
    this.#drawn = picture;

    const context = this.#context;
    context.clearRect(0, 0, this.#width, this.#height);
    const style = getComputedStyle(this.#canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    context.font = `12px ${style.fontFamily}`;
    this.#drawGrid(colour, goal);
    context.save();
    context.beginPath();
    context.rect(LEFT, 0, this.#width - LEFT - RIGHT, this.#height - BELOW + 1);
    context.clip();
    const runs = this.#runs(now);
    for (let index = this.#series.length - 1; index >= 0; index--) {
      for (const run of runs) this.#drawSeries(run, index, now, colour(this.#series[index].colour));
    }
    context.restore();
    this.#drawPointer(now, colour);
  }

  #drawGrid(colour, goal) {
    const context = this.#context;
    const right = this.#width - RIGHT;
    const parts = this.#height > 170 ? 4 : 2;
    context.lineWidth = 1;
    context.strokeStyle = colour("--grid");
    context.fillStyle = colour("--faint");
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let part = 0; part <= parts; part++) {
      const value = (goal * part) / parts;
      const y = Math.round(this.#y(value)) + 0.5;
      if (y < 0) continue; // while the scale grows
      context.beginPath();
      context.moveTo(LEFT, y);
      context.lineTo(right, y);
      context.stroke();
      context.fillText(this.#say(value), LEFT - 8, y);
    }
    context.textBaseline = "alphabetic";
    const marks = [
      [0, "left", "2 min ago"],
      [0.5, "center", "1 min ago"],
      [1, "right", "now"],
    ];
    for (const [place, align, words] of marks) {
      context.textAlign = align;
      context.fillText(words, LEFT + (right - LEFT) * place, this.#height - 5);
    }
  }

  #drawSeries(points, index, now, colour) {
    const context = this.#context;
    const upper = points.map(({ at, values }) => [this.#x(at, now), this.#y(this.#heightOf(values, index))]);
    const lower = this.#stacked && index > 0;
    const bottom = lower
      ? points.map(({ at, values }) => [this.#x(at, now), this.#y(this.#heightOf(values, index - 1))]).reverse()
      : [
          [upper.at(-1)[0], this.#y(0)],
          [upper[0][0], this.#y(0)],
        ];
    context.beginPath();
    context.moveTo(...upper[0]);
    curve(context, upper);
    context.lineTo(...bottom[0]);
    if (lower) curve(context, bottom);
    else context.lineTo(...bottom[1]);
    context.closePath();
    context.globalAlpha = this.#stacked ? 0.28 : 0.12;
    context.fillStyle = colour;
    context.fill();
    context.globalAlpha = 1;
    context.beginPath();
    context.moveTo(...upper[0]);
    curve(context, upper);
    context.lineWidth = 1.75;
    context.lineJoin = "round";
    context.strokeStyle = colour;
    context.stroke();
  }

  #drawPointer(now, colour) {
    const context = this.#context;
    const at = this.#pointer === null ? null : now - SPAN * (1 - (this.#pointer - LEFT) / (this.#width - LEFT - RIGHT));
    const near = at === null ? undefined : closest(this.#points, at);
    if (!near || Math.abs(near.at - at) > HOLE || near.at > now) {
      this.#tip.hidden = true;
      return;
    }
    const x = this.#x(near.at, now);
    context.strokeStyle = colour("--faint");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x, ABOVE);
    context.lineTo(x, this.#height - BELOW);
    context.stroke();
    for (let index = this.#series.length - 1; index >= 0; index--) {
      context.beginPath();
      context.arc(x, this.#y(this.#heightOf(near.values, index)), 3.5, 0, 2 * Math.PI);
      context.fillStyle = colour(this.#series[index].colour);
      context.fill();
      context.strokeStyle = colour("--card");
      context.lineWidth = 1.5;
      context.stroke();
    }
    const rows = this.#series.map(({ name, colour }, index) => {
      const row = document.createElement("span");
      row.style.setProperty("--of", `var(${colour})`);
      row.textContent = `${name} ${this.#say(near.values[index])}`;
      return row;
    });
    const time = document.createElement("time");
    time.textContent = new Date(near.at).toLocaleTimeString();
    this.#tip.replaceChildren(time, ...rows.reverse());
    this.#tip.hidden = false;
    const room = this.#width - this.#tip.offsetWidth;
    const left = x + 12 < room ? x + 12 : x - 12 - this.#tip.offsetWidth;
    this.#tip.style.transform = `translate(${Math.max(0, left)}px, ${ABOVE}px)`;
  }

  /** The points in sight, cut where a silence was. */
  #runs(now) {
    const runs = [];
    let previous = -Infinity;
    for (const point of this.#points) {
      if (point.at < now - SPAN - 2 * HOLE) continue;
      if (point.at - previous > HOLE) runs.push([]);
      runs.at(-1).push(point);
      previous = point.at;
    }
    return runs;
  }

  #highest(now) {
    const seen = this.#points.filter(({ at }) => at >= now - SPAN);
    return Math.max(0, ...seen.flatMap(({ values }) => values.map((_, index) => this.#heightOf(values, index))));
  }

  #heightOf(values, index) {
    if (!this.#stacked) return values[index];
    let sum = 0;
    for (let below = 0; below <= index; below++) sum += values[below];
    return sum;
  }

  #x(at, now) {
    return LEFT + (this.#width - LEFT - RIGHT) * (1 - (now - at) / SPAN);
  }

  #y(value) {
    return ABOVE + (this.#height - ABOVE - BELOW) * (1 - value / this.#top);
  }
}

/** The next of 1, 2, 4, 5, 8 or 10 times a power of ten: these halve and quarter well on the axis. */
function round(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 8, 10].find((step) => step * power >= value) * power;
}

function closest(points, at) {
  let best = points[0];
  for (const point of points) {
    if (Math.abs(point.at - at) < Math.abs(best.at - at)) best = point;
  }
  return best;
}

/**
 * Goes on from the first point through all others, smoothly and without ever going beyond a point, so that no figure
 * is shown that was not measured: a monotone cubic, with the tangents of F. N. Fritsch and J. Butland (A Method for
 * Constructing Local Monotone Piecewise Cubic Interpolants, 1984).
 */
function curve(context, points) {
  const slopes = [];
  for (let index = 0; index + 1 < points.length; index++) {
    slopes.push((points[index + 1][1] - points[index][1]) / (points[index + 1][0] - points[index][0]));
  }
  const tangent = (index) => {
    const before = slopes[index - 1] ?? slopes[index];
    const after = slopes[index] ?? slopes[index - 1];
    return before * after <= 0 ? 0 : (2 * before * after) / (before + after);
  };
  for (let index = 0; index + 1 < points.length; index++) {
    const [x, y] = points[index];
    const [nextX, nextY] = points[index + 1];
    const third = (nextX - x) / 3;
    const leaving = y + third * tangent(index);
    const arriving = nextY - third * tangent(index + 1);
    context.bezierCurveTo(x + third, leaving, nextX - third, arriving, nextX, nextY);
  }
}
