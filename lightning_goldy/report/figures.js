(() => {
  "use strict";
  const themes = JSON.parse(document.querySelector("script.themes").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 720px)");
  let printing = false;

  const unpacked = (column) => Array.isArray(column) ? column : column.at.map((place) => column.of[place]);
  const rowsOf = (columns) => {
    const names = Object.keys(columns);
    const values = names.map((name) => unpacked(columns[name]));
    const length = values.length ? values[0].length : 0;
    return Array.from({ length }, (_, row) => Object.fromEntries(names.map((name, at) => [name, values[at][row]])));
  };
  const single = (spec) => ("mark" in spec || "layer" in spec)
    && !["column", "row", "facet"].some((name) => name in (spec.encoding || {}));

  // Vega tells, as a warning, that it does not fit a height of so much a category to its place; as a number it is one.
  const heightOf = (spec) => {
    const { field } = (spec.encoding || spec.layer.map((layer) => layer.encoding || {}).find((one) => one.y) || {}).y || {};
    const values = Object.values(spec.datasets).flat().map((row) => row[field]).filter((value) => value != null);
    return spec.height.step * Math.max(1, new Set(values).size);
  };

  // A figure that is so much too wide for its place: its parts shrink, or fewer stand side by side; nothing where
  // neither helps, and it scrolls within its box.
  const narrower = (spec, excess) => {
    const made = structuredClone(spec);
    const parts = made.concat || [made.facet && made.spec && !made.facet.column ? made.spec : made];
    const columns = made.concat ? Math.min(made.columns || parts.length, parts.length) : 1;
    if (!parts.every((part) => typeof part.width === "number")) {
      made.columns = columns - 1;
      return columns > 1 ? made : undefined;
    }
    // Parts that would be slivers go below each other, each with the names that its neighbour told.
    const sliver = columns > 1 && parts.slice(0, columns).reduce((sum, part) => sum + part.width, 0) - excess < 110 * columns;
    if (sliver) made.columns = 1;
    const widths = parts.map((part) => part.width);
    const rows = widths.map((_, at) => at % columns ? 0 : widths.slice(at, at + columns).reduce((a, b) => a + b));
    const widest = Math.max(...rows);
    const left = Math.max(columns === 1 ? 200 : 60 * columns, widest - excess);
    const stack = (value) => {
      if (!value || typeof value !== "object") return;
      if (value.legend && value.legend.orient === "top") Object.assign(value.legend, { columns: 1, labelLimit: 240 });
      if (sliver && value.y && value.y.axis) value.y.axis.labels = true;
      Object.values(value).forEach(stack);
    };
    stack(made);
    if (sliver) return made;
    for (const part of parts) part.width = Math.min(part.width, Math.floor(part.width * left / widest));
    return JSON.stringify(made) === JSON.stringify(spec) ? undefined : made;
  };

  // A legend that is wider than its figure is cut by it: its names go below each other.
  const cut = (element) => {
    const svg = element.querySelector("svg");
    const edge = svg ? svg.getBoundingClientRect().right + 1 : 0;
    return Boolean(svg) && [...svg.querySelectorAll(".role-legend-label text")].some(
      (label) => label.getBoundingClientRect().right > edge);
  };
  const below = (spec) => {
    const made = structuredClone(spec);
    const stack = (value) => {
      if (!value || typeof value !== "object") return;
      if (value.legend && value.legend.orient === "top") value.legend.columns = 1;
      Object.values(value).forEach(stack);
    };
    stack(made);
    return JSON.stringify(made) === JSON.stringify(spec) ? undefined : made;
  };

  class Chart {
    constructor(element) {
      this.content = JSON.parse(element.querySelector("script").textContent);
      this.plot = element.querySelector(".plot");
      this.caption = element.querySelector("figcaption");
      this.slider = element.querySelector("input");
      this.label = element.querySelector("output");
      this.turn = 0;
      if (this.slider) this.slider.addEventListener("input", () => this.show());
    }
    frame() {
      const { frames } = this.content;
      return frames[this.slider ? Number(this.slider.value) : frames.length - 1];
    }
    data(frame) {
      const of = (name, columns) => Object.fromEntries(Object.entries(columns).map(
        ([column, values]) => [column, values === 0 ? this.content.shared[name][column] : values]));
      return Object.entries(frame.data).map(([name, columns]) => [name, rowsOf(of(name, columns))]);
    }
    async show() {
      const frame = this.frame();
      if (this.caption) this.caption.textContent = frame.caption || "";
      if (this.label) this.label.textContent = frame.label;
      const turn = ++this.turn;
      const theme = dark.matches && !printing ? "dark" : "light";
      if ("none" in frame) {
        this.clear();
        this.plot.textContent = frame.none;
        return;
      }
      const state = `${theme} ${frame.spec} ${narrow.matches}`;
      if (this.result && this.state === state) {
        for (const [name, rows] of this.data(frame)) this.result.view.data(name, rows);
        this.result.view.run();
        return;
      }
      await this.draw(frame, theme, state, turn, this.content.specs[frame.spec], 4);
    }
    async draw(frame, theme, state, turn, bare, tries) {
      const spec = { ...bare };
      spec.datasets = { ...spec.datasets, ...Object.fromEntries(this.data(frame)) };
      spec.params = [...(spec.params || []), ...this.content.params];
      if (single(spec) && !("width" in spec)) {
        Object.assign(spec, { width: "container", autosize: { type: "fit-x", contains: "padding" } });
        if (spec.height && spec.height.step) spec.height = heightOf(spec);
      }
      const config = { background: "transparent", ...themes[theme], ...spec.config };
      delete spec.config;
      // Sharp on paper, but a browser cannot hold tens of thousands of elements.
      const renderer = Object.values(spec.datasets).some((rows) => rows.length > 4000) ? "canvas" : "svg";
      // The interpreter of expressions (`ast`) needs no `eval`, which the page forbids.
      const options = { mode: "vega-lite", ast: true, renderer, actions: false, config };
      const element = document.createElement("div");
      this.clear();
      this.plot.append(element);
      try {
        const result = await vegaEmbed(element, spec, options);
        if (turn !== this.turn) {
          result.finalize();
          return;
        }
        Object.assign(this, { result, state });
        const stacked = cut(element) && tries ? below(bare) : undefined;
        if (stacked) {
          await this.draw(frame, theme, state, turn, stacked, tries - 1);
          return;
        }
        const excess = Math.ceil(element.querySelector("svg, canvas").getBoundingClientRect().width - this.plot.clientWidth);
        const other = narrow.matches && !printing && excess > 0 && tries ? narrower(bare, excess) : undefined;
        if (other) await this.draw(frame, theme, state, turn, other, tries - 1);
      } catch (error) {
        this.plot.textContent = `This figure could not be drawn: ${error.message}`;
      }
    }
    clear() {
      if (this.result) this.result.finalize();
      this.result = undefined;
      this.plot.replaceChildren();
    }
  }

  const charts = new Map();
  const elements = [...document.querySelectorAll("figure.chart:not(.old)")];
  const draw = (element) => {
    if (!charts.has(element)) charts.set(element, new Chart(element));
    return charts.get(element).show();
  };
  // Figures are drawn when they come near to the window.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((found) => found.isIntersecting)) {
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "800px" });
  for (const element of elements) watcher.observe(element);
  const redraw = () => { for (const element of charts.keys()) draw(element); };
  dark.addEventListener("change", redraw);
  narrow.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => {
    printing = true;
    // What is folded is not printed.
    elements.filter((element) => !element.closest("details:not([open])")).forEach(draw);
  });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });

  // A link to what is folded opens it.
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  window.addEventListener("hashchange", reveal);
  reveal();

  // Numbers are shown with thousands separators and units; a cell without one sorts last.
  const numberOf = (cell) => {
    const match = cell.textContent.replace(/,/g, "").match(/-?\d+(\.\d+)?(e[+-]?\d+)?/i);
    return match ? Number(match[0]) : NaN;
  };
  const textOf = (cell) => cell.textContent.trim();
  const sort = (table, column, head) => {
    const falling = head.getAttribute("aria-sort") === "ascending";
    const numbers = head.classList.contains("number");
    const rows = [...table.tBodies[0].rows];
    const order = (first, second) => {
      const [a, b] = [first.cells[column], second.cells[column]];
      if (!numbers) return textOf(a).localeCompare(textOf(b), "en", { numeric: true }) * (falling ? -1 : 1);
      const [x, y] = [numberOf(a), numberOf(b)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return (x - y) * (falling ? -1 : 1);
    };
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    table.tBodies[0].append(...rows.sort(order));
  };
  // A spreadsheet would run a cell that begins like a formula.
  const quoted = (cell) => {
    const text = textOf(cell);
    const plain = /^[=+@\t\r]|^-(?!\d)/.test(text) ? `'${text}` : text;
    return `"${plain.replace(/"/g, '""')}"`;
  };
  const csv = (table) => [...table.rows].map((row) => [...row.cells].map(quoted).join(",")).join("\r\n");
  const titleOf = (element) => {
    const section = element.closest("section");
    return (section && section.querySelector("h2") || document.querySelector("h1")).textContent;
  };
  // Long names break after a word rather than within one.
  for (const name of document.querySelectorAll("tbody th")) {
    const words = name.children.length ? [] : name.textContent.split(/(?<=[_/])/);
    if (words.length > 1) name.replaceChildren(...words.flatMap((word) => [word, document.createElement("wbr")]));
  }
  for (const table of document.querySelectorAll(".table > table")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, column, head));
      head.append(button);
    });
    const download = document.createElement("button");
    Object.assign(download, { type: "button", className: "download", textContent: "Download as CSV" });
    download.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob(["\ufeff", csv(table)], { type: "text/csv" }));
      link.download = `${titleOf(table).toLowerCase().replace(/[^a-z0-9]+/g, "-")}.csv`;
      link.click();
      URL.revokeObjectURL(link.href);
    });
    table.parentElement.after(download);
  }
})();
