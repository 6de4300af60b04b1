// Memory of the KV cache of every member, with and without grouped queries.
"use strict";
const Cache = {
  // Keys and values of all layers, for every token of every sequence.
  bytes(cfg, tokens, batch, size, heads = cfg.n_kv_heads) {
    return 2 * cfg.n_layers * heads * cfg.head_dim * size * tokens * batch;
  },
};

See.mount("cache", (root) => {
  const names = Object.keys(LLAMA_EDU.family);
  let name = "llama-3.1-8b", power = 13, batch = 1, size = 2;
  const rows = See.make("tbody");
  const table = See.make("table", { class: "see-table" },
    See.make("thead", {}, See.make("tr", {}, ...["", "memory", ""].map((t) => See.make(t ? "th" : "td", t ? { scope: "col" } : {}, t)))), rows);
  const said = See.make("p", { class: "see-said", "aria-live": "polite" });
  const show = () => {
    const cfg = LLAMA_EDU.family[name], tokens = 2 ** power;
    const parts = [
      ["weights", cfg.parameters * 2],
      [`cache, ${cfg.n_kv_heads} heads of keys and values`, Cache.bytes(cfg, tokens, batch, size)],
      [`cache if each of the ${cfg.n_heads} query heads had its own`, Cache.bytes(cfg, tokens, batch, size, cfg.n_heads)],
    ];
    const most = Math.max(...parts.map(([, b]) => b));
    rows.replaceChildren(...parts.map(([label, b]) => See.make("tr", {},
      See.make("th", { scope: "row" }, label), See.make("td", {}, See.bytes(b)),
      See.make("td", { class: "see-bar" }, See.make("div", { style: `width:${100 * b / most}%` })))));
    const past = tokens > cfg.max_seq_len ? ` The model was trained for ${See.number(cfg.max_seq_len)} tokens: this is more.` : "";
    const fits = Math.floor((80e9 - parts[0][1]) / Cache.bytes(cfg, tokens, 1, size));
    said.textContent = (fits > 0 ? `Beside the weights in bf16, 80 GB hold ${See.number(fits)} such sequence${fits > 1 ? "s" : ""}.` : "Weights in bf16 and one such sequence do not fit into 80 GB.") + past;
  };
  root.append(
    See.choice("Model", names.map((m) => [m, m]), name, (v) => { name = v; show(); }),
    See.slider("Tokens a sequence", { min: 8, max: 17, value: power, show: (v) => See.number(2 ** v) }, (v) => { power = v; show(); }),
    See.slider("Sequences", { min: 1, max: 64, value: batch }, (v) => { batch = v; show(); }),
    See.choice("Numbers of the cache", [["2", "bfloat16: 2 bytes"], ["1", "int8: 1 byte"], ["4", "float32: 4 bytes"]], "2", (v) => { size = Number(v); show(); }),
    table, said);
  return show;
});
