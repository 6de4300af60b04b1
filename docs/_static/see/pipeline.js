// Pipeline schedules drawn from their rules: what each stage does when, and how long it waits.
"use strict";
const Pipe = {
  // Order of work of a rank: [[forward?, chunk, micro-batch], ...]. A backward takes twice a forward.
  order(kind, rank, P, M, V) {
    if (kind !== "interleaved") {
      const warm = kind === "gpipe" ? M : Math.min(M, P - rank - 1);
      const out = [];
      for (let m = 0; m < warm; m++) out.push([true, 0, m]);
      for (let m = warm; m < M; m++) out.push([true, 0, m], [false, 0, m - warm]);
      for (let m = M - warm; m < M; m++) out.push([false, 0, m]);
      return out;
    }
    // Groups of P micro-batches go through a rank's first chunk, then through its second, and so on; backward reversed.
    const total = M * V, warm = Math.min(total, 2 * (P - rank - 1) + (V - 1) * P);
    const item = (i, forward) => {
      const inGroup = i % (P * V), chunk = Math.floor(inGroup / P);
      return [forward, forward ? chunk : V - 1 - chunk, Math.floor(i / (P * V)) * P + inGroup % P];
    };
    const out = [];
    for (let i = 0; i < warm; i++) out.push(item(i, true));
    for (let i = warm; i < total; i++) out.push(item(i, true), item(i - warm, false));
    for (let i = total - warm; i < total; i++) out.push(item(i, false));
    return out;
  },

  // When each piece of work runs: a forward needs the chunk before it, a backward the chunk after it.
  simulate(kind, P, M, V) {
    if (kind !== "interleaved") V = 1;
    const orders = Array.from({ length: P }, (_, r) => Pipe.order(kind, r, P, M, V));
    const end = new Map(), free = Array(P).fill(0), next = Array(P).fill(0), bars = [];
    const key = (forward, stage, m) => `${forward}|${stage}|${m}`;
    for (let moved = true; moved;) {
      moved = false;
      for (let r = 0; r < P; r++)
        while (next[r] < orders[r].length) {
          const [forward, chunk, m] = orders[r][next[r]], stage = chunk * P + r;
          const before = forward ? (stage ? key(true, stage - 1, m) : null)
            : stage === P * V - 1 ? key(true, stage, m) : key(false, stage + 1, m);
          if (before !== null && !end.has(before)) break;
          const start = Math.max(free[r], before === null ? 0 : end.get(before));
          const length = (forward ? 1 : 2) / V;
          free[r] = start + length;
          end.set(key(forward, stage, m), free[r]);
          bars.push({ rank: r, start, length, forward, chunk, m });
          next[r]++;
          moved = true;
        }
    }
    const span = Math.max(...free), ideal = 3 * M;
    return { bars, span, bubble: (span - ideal) / ideal };
  },
};

See.mount("pipeline", (root) => {
  let kind = "1f1b", P = 4, wanted = 8, V = 2;
  const picture = See.make("svg:svg", { class: "see-svg", role: "img" });
  const said = See.make("p", { class: "see-said", "aria-live": "polite" });
  const show = () => {
    const interleaved = kind === "interleaved", chunks = interleaved ? V : 1;
    const M = interleaved ? Math.ceil(wanted / P) * P : wanted;  // groups of P go through each chunk
    const { bars, span, bubble } = Pipe.simulate(kind, P, M, V);
    const width = See.room(root), left = 20, scale = (width - left) / span, gap = scale * 1 / chunks > 4 ? 0.7 : 0;
    picture.setAttribute("viewBox", `0 0 ${width} ${P * 26 + 20}`);
    picture.replaceChildren(...bars.map((b) => See.make("svg:rect", {
      x: left + b.start * scale, y: b.rank * 26, width: b.length * scale - gap, height: 22,
      class: `${b.forward ? "see-forward" : "see-backward"} see-chunk-${b.chunk % 2}`,
    }, See.make("svg:title", {}, `stage ${b.rank}, chunk ${b.chunk}, micro-batch ${b.m}, ${b.forward ? "forward" : "backward"}`))),
    ...Array.from({ length: P }, (_, r) => See.make("svg:text", { x: 14, y: r * 26 + 16, class: "see-label see-label-end" }, `${r}`)),
    See.make("svg:text", { x: width, y: P * 26 + 14, class: "see-label see-label-end" }, "time \u2192"));
    picture.setAttribute("aria-label", `Schedule of ${P} stages and ${M} micro-batches: time runs to the right, a row is a stage`);
    See.enable(pieces, interleaved);
    const rounded = M === wanted ? "" : ` Interleaving takes its micro-batches in groups of P: ${wanted} became ${M}.`;
    said.textContent = `${P} stages, ${M} micro-batch${M > 1 ? "es" : ""}, ${chunks} chunk${chunks > 1 ? "s" : ""} a stage: the bubble is ${(100 * bubble).toFixed(1)} % of the work; the formula (P\u22121)/(V\u00b7M) gives ${(100 * (P - 1) / (chunks * M)).toFixed(1)} %.${rounded}`;
  };
  const pieces = See.slider("Chunks a stage V", { min: 2, max: 4, value: V }, (v) => { V = v; show(); });
  root.append(
    See.choice("Schedule", [["gpipe", "GPipe"], ["1f1b", "1F1B"], ["interleaved", "interleaved 1F1B"]], kind, (v) => { kind = v; show(); }),
    See.slider("Stages P", { min: 2, max: 16, value: P }, (v) => { P = v; show(); }),
    See.slider("Micro-batches M", { min: 1, max: 64, value: wanted }, (v) => { wanted = v; show(); }),
    pieces, picture, See.legend(["see-forward", "forward"], ["see-backward", "backward"]), said);
  return show;
});
