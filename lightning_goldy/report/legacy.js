(() => {
  "use strict";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "resetScale2d"]] };
  const light = { text: "#1d232b", grid: "#dde2e8", lines: ["#2a6fb0", "#c8871a", "#3a9a6b", "#b5489a", "#7a6bd1", "#c4453c"] };
  const night = { text: "#e4e8ed", grid: "#333c46", lines: ["#6cb0f0", "#e3b341", "#5cc596", "#e07cc6", "#a89af5", "#f0786f"] };
  let printing = false;

  const themed = (layout) => {
    const colours = dark.matches && !printing ? night : light;
    const result = {
      ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: colours.lines,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.grid, activecolor: colours.text },
      font: { color: colours.text, family: "system-ui, sans-serif", size: 12 },
    };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        result[key] = { gridcolor: colours.grid, linecolor: colours.grid, zerolinecolor: colours.grid, ...layout[key] };
      }
    }
    return result;
  };

  const charts = [...document.querySelectorAll("figure.chart.old")].map((element) => {
    const frames = JSON.parse(element.querySelector("script").textContent);
    const [plot, caption] = [element.querySelector(".plot"), element.querySelector("figcaption")];
    const [slider, label] = [element.querySelector("input"), element.querySelector("output")];
    const draw = () => {
      const frame = frames[slider ? Number(slider.value) : frames.length - 1];
      // Plotly keeps and changes what it is given.
      const figure = structuredClone(frame.figure);
      Plotly.react(plot, figure.data, themed(figure.layout), config);
      if (caption) caption.textContent = frame.caption;
      if (label) label.textContent = frame.label;
    };
    if (slider) slider.addEventListener("input", draw);
    draw();
    return draw;
  });
  const redraw = () => charts.forEach((draw) => draw());
  dark.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => { printing = true; redraw(); });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });
})();
