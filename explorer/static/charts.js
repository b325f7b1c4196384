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
      const config = { displayModeBar: false, responsive: true, scrollZoom: Boolean(figure.zoom) };
      Plotly.react(place, figure.data, layout, config);
      if (figure.links) followPoints(place);
    }
  }

  // A click on a point opens its page; the point under the pointer shows its picture, if it has one.
  function followPoints(place) {
    const picture = Object.assign(document.createElement("img"), { alt: "", className: "hovered", hidden: true });
    const linksOf = (event) => [event.points[0].customdata].flat();
    place.append(picture);
    place.on("plotly_click", (event) => {
      const [page] = linksOf(event);
      if (typeof page === "string") window.location.assign(page);
    });
    place.on("plotly_hover", (event) => {
      const [, source] = linksOf(event);
      if (typeof source !== "string") return;
      const { x, y, xaxis, yaxis } = event.points[0];
      const left = xaxis._offset + xaxis.l2p(x), top = yaxis._offset + yaxis.l2p(y);
      picture.src = source;
      picture.style.left = `${Math.max(0, Math.min(left + 16, place.clientWidth - 130))}px`;
      picture.style.top = `${top < 150 ? top + 30 : top - 150}px`; // its label is as high as the point
      picture.hidden = false;
    });
    place.on("plotly_unhover", () => {
      picture.hidden = true;
    });
  }

  document.addEventListener("DOMContentLoaded", () => draw(document));
  document.addEventListener("htmx:beforeSwap", (event) => {
    for (const place of event.detail.target.querySelectorAll(".plot[data-drawn]")) Plotly.purge(place);
  });
  // Not at htmx:afterSwap: when htmx settles, it takes away the classes that were given to new elements until then.
  document.addEventListener("htmx:afterSettle", () => draw(document));
})();
