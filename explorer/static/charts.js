// Draws the charts of a page: Plotly figures that the server wrote into it as JSON, in the page's colours.
"use strict";
(() => {
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function draw(root) {
    for (const source of root.querySelectorAll("script[data-plot]")) {
      const place = document.getElementById(source.dataset.plot);
      if (!place || place.dataset.drawn) continue;
      place.dataset.drawn = "yes";
      const figure = JSON.parse(source.textContent);
      const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), automargin: true };
      const layout = {
        paper_bgcolor: "transparent",
        plot_bgcolor: "transparent",
        font: { color: style("--ink"), family: "system-ui, sans-serif" },
        margin: { l: 48, r: 12, t: 12, b: 48 },
        legend: { orientation: "h", traceorder: "normal", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
        ...figure.layout,
      };
      for (const name of ["xaxis", "yaxis", "yaxis2"]) {
        if (name !== "yaxis2" || layout[name]) layout[name] = { ...axis, ...layout[name] };
      }
      Plotly.react(place, figure.data, layout, { displayModeBar: false, responsive: true });
      if (figure.links) followPoints(place);
    }
  }

  // A click on a point opens its page.
  function followPoints(place) {
    place.on("plotly_click", (event) => {
      const page = event.points[0].customdata;
      if (typeof page === "string") window.location.assign(page);
    });
  }

  document.addEventListener("DOMContentLoaded", () => draw(document));
  document.addEventListener("htmx:beforeSwap", (event) => {
    for (const place of event.detail.target.querySelectorAll(".plot[data-drawn]")) Plotly.purge(place);
  });
  // Not at htmx:afterSwap: when htmx settles, it takes away the classes that were given to new elements until then.
  document.addEventListener("htmx:afterSettle", () => draw(document));
})();
