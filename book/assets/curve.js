/* Specification curves: the choices behind the dot under the pointer, or under the arrow keys, in words below the figure.

   They are read from the figure: in each path of a verdict or a choice, a specification begins with M and its x. */
(() => {
  "use strict";
  for (const svg of document.querySelectorAll("svg.curve")) {
    const status = svg.nextElementSibling;
    const paths = [...svg.querySelectorAll("path[data-choice]")];
    const chosen = new Map();
    for (const path of paths)
      for (const [, x] of path.getAttribute("d").matchAll(/M([\d.]+)/g))
        chosen.set(Number(x), [...chosen.get(Number(x)) ?? [], path.dataset.choice]);
    const places = [...chosen.keys()].sort((a, b) => a - b);
    const guide = document.createElementNS(svg.namespaceURI, "path");
    guide.setAttribute("stroke", "currentColor");
    guide.setAttribute("stroke-width", "0.7");
    svg.append(guide);
    let at = -1;
    const show = index => {
      at = Math.min(Math.max(index, 0), places.length - 1);
      guide.setAttribute("d", `M${places[at]} 0V${svg.viewBox.baseVal.height}`);
      status.textContent = `${at + 1} of ${places.length}: ${chosen.get(places[at]).join(", ")}`;
    };
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("pointermove", event => {
      const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
      show(places.reduce((best, place, i) => Math.abs(place - x) < Math.abs(places[best] - x) ? i : best, 0));
    });
    svg.addEventListener("keydown", event => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { event.preventDefault(); show(at + step); }
    });
  }
})();
