// Byte-pair encoding of the reader's own text, merge by merge: lesson 10's plain trainer.
"use strict";
const BPE = {
  PATTERN: /'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+/gu,

  // [{pair: [left, right], id, count}] and the text as ids after each merge. Ties: smaller left id, then smaller right.
  train(text, merges) {
    let words = (text.match(BPE.PATTERN) || []).map((word) => [...new TextEncoder().encode(word)]);
    const steps = [{ words, merge: null }];
    for (let id = 256; id < 256 + merges; id++) {
      const counts = new Map();
      for (const word of words)
        for (let i = 0; i + 1 < word.length; i++) {
          const key = word[i] * 65536 + word[i + 1];
          counts.set(key, (counts.get(key) || 0) + 1);
        }
      let best = null;
      for (const [key, count] of counts)
        if (best === null || count > best.count || (count === best.count && key < best.key)) best = { key, count };
      if (best === null || best.count < 2) break;
      const pair = [Math.floor(best.key / 65536), best.key % 65536];
      words = words.map((word) => BPE.merge(word, pair, id));
      steps.push({ words, merge: { pair, id, count: best.count } });
    }
    return steps;
  },

  merge(word, [left, right], id) {
    const out = [];
    for (let i = 0; i < word.length; i++) {
      if (i + 1 < word.length && word[i] === left && word[i + 1] === right) { out.push(id); i++; }
      else out.push(word[i]);
    }
    return out;
  },

  // Bytes of every id after `steps`.
  pieces(steps) {
    const pieces = Array.from({ length: 256 }, (_, i) => [i]);
    for (const { merge } of steps) if (merge) pieces[merge.id] = [...pieces[merge.pair[0]], ...pieces[merge.pair[1]]];
    return pieces;
  },

  text(bytes) {
    const decoded = new TextDecoder().decode(new Uint8Array(bytes));
    return decoded.includes("\ufffd") ? bytes.map((b) => `<${b.toString(16).padStart(2, "0")}>`).join("") : decoded;
  },
};

See.mount("bpe", (root) => {
  const sample = "the cat sat on the mat, and that was that: the cat sat there, and the rat sat on the cat's hat";
  const area = See.make("textarea", { id: "see-bpe-text", rows: 3, spellcheck: "false" });
  area.value = sample;
  const label = See.make("label", { for: "see-bpe-text" }, "Your text");
  const tokens = See.make("p", { class: "see-tokens" });
  const said = See.make("p", { class: "see-said", "aria-live": "polite" });
  let steps, at = 8;
  const slider = See.slider("Merges", { min: 0, max: 40, value: at }, (n) => { at = n; show(); });
  const show = () => {
    const now = Math.min(at, steps.length - 1);
    const pieces = BPE.pieces(steps);
    const ids = steps[now].words.flat();
    tokens.replaceChildren(...steps[now].words.flatMap((word) =>
      word.map((id) => See.make("span", { class: id < 256 ? "see-byte" : "see-merged", title: `id ${id}` }, BPE.text(pieces[id])))));
    const merge = steps[now].merge;
    const bytes = new TextEncoder().encode(area.value).length;
    const done = now < at ? ` No pair occurs twice any more: training ends after ${now} merges.` : "";
    said.textContent = merge
      ? `Merge ${now}: "${BPE.text(pieces[merge.pair[0]])}" and "${BPE.text(pieces[merge.pair[1]])}" stood together ${merge.count} times and become token ${merge.id}. ${bytes} bytes are now ${ids.length} tokens.${done}`
      : `No merge yet: ${bytes} bytes are ${ids.length} tokens.${done}`;
  };
  const again = () => { steps = BPE.train(area.value.slice(0, 5000), 40); show(); };
  area.addEventListener("input", again);
  root.append(label, area, slider, tokens, said);
  return again;
});
