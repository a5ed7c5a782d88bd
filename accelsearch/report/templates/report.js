"use strict";
// Draws the figures in the page's own colours, and moves the sliders of the image pairs.
(() => {
  const { figures, light, dark } = JSON.parse(document.getElementById("figures").textContent);
  const wantsDark = matchMedia("(prefers-color-scheme: dark)");
  const charts = [...document.querySelectorAll(".chart")];
  const draw = (template, size = { autosize: true }) => {
    for (const chart of charts) {
      const { data, layout } = figures[chart.dataset.figure];
      Plotly.react(chart, data, { ...structuredClone(layout), template, ...size }, {
        displayModeBar: false,
        responsive: size.autosize,
      });
    }
  };
  const follow = () => draw(wantsDark.matches ? dark : light);
  follow();
  wantsDark.addEventListener("change", follow);
  // The page still has the screen's width then: a chart that took it would be cut off on paper.
  addEventListener("beforeprint", () => draw(light, { autosize: false, width: 640 }));
  addEventListener("afterprint", follow);

  for (const slider of document.querySelectorAll(".frame input")) {
    slider.addEventListener("input", () => {
      slider.parentElement.style.setProperty("--cut", `${slider.value}%`);
    });
  }
  for (const views of document.querySelectorAll(".views")) {
    const pairs = views.nextElementSibling;
    views.addEventListener("click", ({ target }) => {
      if (!target.dataset.show) return;
      pairs.dataset.view = target.dataset.show;
      for (const button of views.children) {
        button.setAttribute("aria-pressed", String(button === target));
      }
    });
  }
  document.documentElement.dataset.ready = "true";
})();
