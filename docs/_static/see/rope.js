// Rotary positions as hands that turn with the distance; frequencies come from the package (data.js).
"use strict";
const Rope = {
  // Mean over all pairs of cos(distance * frequency): the score of two equal vectors, divided by their squared length.
  score(frequencies, distance) {
    return frequencies.reduce((sum, f) => sum + Math.cos(distance * f), 0) / frequencies.length;
  },
};

See.mount("rope", (root) => {
  const models = Object.keys(LLAMA_EDU.rope), LONGEST = Math.log10(131073);
  let model = models[0], distance = 12;
  const dials = See.make("div", { class: "see-dials", role: "img" });
  const curve = See.make("svg:svg", { class: "see-svg", role: "img" });
  const said = See.make("p", { class: "see-said", "aria-live": "polite" });
  const shown = [0, 8, 16, 24, 32, 40, 48, 56];
  const show = () => {
    const f = LLAMA_EDU.rope[model];
    dials.replaceChildren(...shown.map((pair) => {
      const angle = distance * f[pair], turns = angle / (2 * Math.PI);
      return See.make("svg:svg", { viewBox: "0 0 84 118", "aria-hidden": "true" },
        See.make("svg:circle", { cx: 42, cy: 42, r: 34, class: "see-dial" }),
        See.make("svg:line", { x1: 42, y1: 42, x2: 76, y2: 42, class: "see-hand-query" }),
        See.make("svg:line", { x1: 42, y1: 42, x2: 42 + 34 * Math.cos(angle), y2: 42 - 34 * Math.sin(angle), class: "see-hand-key" }),
        See.make("svg:text", { x: 42, y: 93, class: "see-label" }, `pair ${pair}`),
        See.make("svg:text", { x: 42, y: 110, class: "see-label" }, `${See.number(turns, turns < 10 ? 2 : 0)} turns`));
    }));
    dials.setAttribute("aria-label", `Eight of the 64 pairs of ${model} at distance ${distance}`);
    const width = See.room(root), left = 30, right = width - 30, x = (d) => left + Math.log10(d + 1) / LONGEST * (right - left);
    const y = (score) => 75 - 60 * score;
    const points = [];
    for (let i = 0; i <= right - left; i += 2) {
      const d = 10 ** (i / (right - left) * LONGEST) - 1;
      points.push(`${left + i},${y(Rope.score(f, d))}`);
    }
    curve.setAttribute("viewBox", `0 0 ${width} 165`);
    curve.replaceChildren(
      ...[1, 0].flatMap((score) => [
        See.make("svg:line", { x1: left, x2: right, y1: y(score), y2: y(score), class: "see-axis" }),
        See.make("svg:text", { x: left - 6, y: y(score) + 5, class: "see-label see-label-end" }, `${score}`)]),
      ...[0, 10, 100, 1000, 10000, 100000].flatMap((d) => [
        See.make("svg:line", { x1: x(d), x2: x(d), y1: 15, y2: 130, class: "see-axis" }),
        See.make("svg:text", { x: x(d), y: 145, class: "see-label" }, See.number(d))]),
      See.make("svg:text", { x: (left + right) / 2, y: 161, class: "see-label" }, "distance (tokens), score of two equal vectors"),
      See.make("svg:polyline", { points: points.join(" "), class: "see-curve" }),
      See.make("svg:line", { x1: x(distance), x2: x(distance), y1: 10, y2: 130, class: "see-hand-key" }));
    curve.setAttribute("aria-label", `Score of two equal vectors of ${model} against their distance from 0 to 131,072, on a logarithmic axis`);
    said.textContent = `At distance ${See.number(distance)} the score of two equal vectors is ${Rope.score(f, distance).toFixed(3)} of its largest value. The slowest pair has turned ${(distance * f[f.length - 1] / (2 * Math.PI)).toFixed(4)} times.`;
  };
  const tokens = (position) => Math.round(10 ** (position / 1000 * LONGEST) - 1);
  root.append(
    See.choice("Model", models.map((m) => [m, m]), model, (m) => { model = m; show(); }),
    See.slider("Distance", { min: 0, max: 1000, value: 218, show: (v) => See.number(tokens(v)) }, (v) => { distance = tokens(v); show(); }),
    See.legend(["see-query", "query"], ["see-key", "key"]), dials, curve, said);
  return show;
});
