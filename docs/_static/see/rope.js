// Rotary positions as hands that turn with the distance; frequencies come from the package (data.js).
"use strict";
const Rope = {
  // Mean over all pairs of cos(distance * frequency): the score of two equal vectors, divided by their squared length.
  score(frequencies, distance) {
    return frequencies.reduce((sum, f) => sum + Math.cos(distance * f), 0) / frequencies.length;
  },
};

See.mount("rope", (root) => {
  const models = Object.keys(LLAMA_EDU.rope);
  let model = models[0], distance = 12;
  const dials = See.make("svg:svg", { class: "see-svg", role: "img" });
  const curve = See.make("svg:svg", { class: "see-svg", role: "img", viewBox: "0 0 680 130" });
  const said = See.make("p", { class: "see-said", "aria-live": "polite" });
  const shown = [0, 8, 16, 24, 32, 40, 48, 56];
  const show = () => {
    const f = LLAMA_EDU.rope[model];
    dials.setAttribute("viewBox", "0 0 680 120");
    dials.replaceChildren(...shown.map((pair, i) => {
      const x = 43 + i * 85, angle = distance * f[pair];
      const turns = angle / (2 * Math.PI);
      return See.make("svg:g", {},
        See.make("svg:circle", { cx: x, cy: 45, r: 34, class: "see-dial" }),
        See.make("svg:line", { x1: x, y1: 45, x2: x + 34, y2: 45, class: "see-hand-query" }),
        See.make("svg:line", { x1: x, y1: 45, x2: x + 34 * Math.cos(angle), y2: 45 - 34 * Math.sin(angle), class: "see-hand-key" }),
        See.make("svg:text", { x, y: 96, class: "see-label" }, `pair ${pair}`),
        See.make("svg:text", { x, y: 113, class: "see-label" }, `${See.number(turns, turns < 10 ? 2 : 0)} turns`));
    }));
    dials.setAttribute("aria-label", `Eight of the 64 pairs of ${model} at distance ${distance}`);
    const points = [];
    for (let i = 0; i <= 340; i++) {
      const d = 10 ** (i / 340 * 5.12) - 1;
      points.push(`${2 * i},${65 - 55 * Rope.score(f, d)}`);
    }
    const here = Math.log10(distance + 1) / 5.12 * 680;
    curve.replaceChildren(
      See.make("svg:line", { x1: 0, x2: 680, y1: 65, y2: 65, class: "see-axis" }),
      See.make("svg:polyline", { points: points.join(" "), class: "see-curve" }),
      See.make("svg:line", { x1: here, x2: here, y1: 5, y2: 125, class: "see-hand-key" }));
    curve.setAttribute("aria-label", `Score of two equal vectors of ${model} against their distance from 0 to 131,072, on a logarithmic axis`);
    said.textContent = `At distance ${See.number(distance)} the score of two equal vectors is ${Rope.score(f, distance).toFixed(3)} of its largest value. The slowest pair has turned ${(distance * f[f.length - 1] / (2 * Math.PI)).toFixed(4)} times.`;
  };
  root.append(
    See.choice("Model", models.map((m) => [m, m]), model, (m) => { model = m; show(); }),
    See.slider("Distance", { min: 0, max: 1000, value: 218, show: (v) => See.number(Math.round(10 ** (v / 1000 * 5.1175) - 1)) },
      (v) => { distance = Math.round(10 ** (v / 1000 * 5.1175) - 1); show(); }),
    dials, curve, said);
  distance = Math.round(10 ** (218 / 1000 * 5.1175) - 1);
  show();
});
