// What the figures share: elements, labelled controls, SVG. No library, no request.
"use strict";
const See = {
  // An element with attributes and children; `svg:` before the tag makes an SVG element.
  make(tag, attributes = {}, ...children) {
    const svg = tag.startsWith("svg:");
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  },

  // A labelled slider; `onChange` gets its number.
  slider(label, { min, max, value, step = 1, show = String }, onChange) {
    const id = `see-${See.count++}`;
    const out = See.make("output", { for: id }, show(value));
    const input = See.make("input", { type: "range", id, min, max, step, value });
    input.addEventListener("input", () => {
      out.textContent = show(Number(input.value));
      onChange(Number(input.value));
    });
    return See.make("div", { class: "see-control" }, See.make("label", { for: id }, label), input, out);
  },

  // A labelled choice among [value, text] pairs.
  choice(label, options, value, onChange) {
    const id = `see-${See.count++}`;
    const select = See.make("select", { id }, ...options.map(([v, text]) => See.make("option", { value: v }, text)));
    select.value = value;
    select.addEventListener("change", () => onChange(select.value));
    return See.make("div", { class: "see-control" }, See.make("label", { for: id }, label), select);
  },

  // Words beside squares of a colour.
  legend(...pairs) {
    return See.make("p", { class: "see-legend" }, ...pairs.map(([colour, text]) => See.make("span", {},
      See.make("svg:svg", { viewBox: "0 0 1 1", "aria-hidden": "true" }, See.make("svg:rect", { width: 1, height: 1, class: colour })), text)));
  },

  // Put a figure in the place of its static twin. `draw(root)` builds it and returns what draws it again, for any width.
  mount(name, draw) {
    const root = document.getElementById(`see-${name}`);
    if (!root) return;
    root.replaceChildren();
    const show = draw(root);
    show();
    let width = root.clientWidth;
    new ResizeObserver(() => {
      if (root.clientWidth === width) return;
      width = root.clientWidth;
      show();
    }).observe(root);
  },

  // Pixels that a picture in the figure may be wide.
  room(root) {
    const style = getComputedStyle(root);
    return Math.floor(root.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
  },

  // Let a control be used, or not where it would change nothing.
  enable(control, on) {
    control.querySelector("input, select").disabled = !on;
  },

  // Numbers with thousands separators, the same in every language setting.
  number(x, digits = 0) {
    return x.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  },

  bytes(n) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let i = 0;
    while (n >= 1024 && i < units.length - 1) { n /= 1024; i++; }
    return `${See.number(n, i && n < 100 ? 1 : 0)} ${units[i]}`;
  },
  count: 0,
};
