// Who sees whom: causal, document and context-parallel masks of a packed sequence.
"use strict";
const Masks = {
  // Document of each of `n` tokens, cut after the given lengths.
  documents(n, lengths) {
    const out = [];
    lengths.forEach((length, d) => { for (let i = 0; i < length && out.length < n; i++) out.push(d); });
    while (out.length < n) out.push(lengths.length);
    return out;
  },
  // Rank of each token when rank r holds chunks r and 2*ranks-1-r of 2*ranks (head-tail), or one run of tokens each.
  ranks(n, ranks, headTail) {
    const chunks = headTail ? 2 * ranks : ranks;
    return Array.from({ length: n }, (_, i) => {
      const chunk = Math.floor(i * chunks / n);
      return headTail ? Math.min(chunk, chunks - 1 - chunk) : chunk;
    });
  },
  // Pairs (query, key) that are computed.
  visible(documents, kind) {
    return documents.map((d, q) => documents.map((e, k) => k <= q && (kind === "causal" || d === e)));
  },
};

See.mount("masks", (root) => {
  const n = 24, lengths = [7, 10, 7];
  let kind = "causal", split = "none", ranks = 2;
  const picture = See.make("svg:svg", { class: "see-svg see-square", role: "img", viewBox: "-22 -22 430 430" });
  const legend = See.make("div");
  const said = See.make("p", { class: "see-said", "aria-live": "polite" });
  const show = () => {
    const seen = Masks.visible(Masks.documents(n, lengths), kind);
    const owner = split === "none" ? Array(n).fill(0) : Masks.ranks(n, ranks, split === "headtail");
    const work = Array(split === "none" ? 1 : ranks).fill(0);
    const cells = [];
    seen.forEach((row, q) => row.forEach((on, k) => {
      if (on) work[owner[q]]++;
      cells.push(See.make("svg:rect", { x: 17 * k, y: 17 * q, width: 16, height: 16, class: on ? `see-rank-${owner[q]}` : "see-off" }));
    }));
    picture.replaceChildren(...cells,
      See.make("svg:text", { x: 0, y: -7, class: "see-label see-label-start" }, "key, first token to last"),
      See.make("svg:text", { x: 0, y: -7, class: "see-label see-label-end", transform: "rotate(-90)" }, "query, first token to last"));
    legend.replaceChildren(work.length > 1 ? See.legend(...work.map((pairs, r) => [`see-rank-${r}`, `rank ${r}: ${pairs} pairs`])) : "");
    See.enable(number, split !== "none");
    const total = work.reduce((a, b) => a + b, 0);
    picture.setAttribute("aria-label", `${kind} mask of 24 tokens, ${total} of ${n * n} pairs computed`);
    const busiest = Math.max(...work) * work.length / total;
    said.textContent = `${total} of ${n * n} pairs are computed. ` + (work.length > 1
      ? `Ranks 0 to ${ranks - 1} compute ${work.join(", ")}. The busiest does ${busiest.toFixed(2)} times its fair share.` : "");
  };
  const number = See.slider("Ranks (CP)", { min: 2, max: 4, value: ranks }, (v) => { ranks = v; show(); });
  root.append(
    See.choice("Mask", [["causal", "causal: every token sees all before it"], ["document", "document: only inside its own document"]], kind, (v) => { kind = v; show(); }),
    See.choice("Ranks share the queries", [["none", "one rank has all"], ["runs", "a run of tokens each"], ["headtail", "chunks i and 2·CP−1−i, as Llama 3"]], split, (v) => { split = v; show(); }),
    number, picture, legend, said);
  return show;
});
