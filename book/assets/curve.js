/* Specification curves: the choices behind the dot under the pointer, or under the arrow keys, in words below the figure.

   They are read from the figure. In the paths of verdicts each specification begins with M and its x; a path of a choice
   has lines, each from the number of a specification through so many that have it. */
(() => {
  "use strict";
  for (const svg of document.querySelectorAll("svg.curve")) {
    const status = svg.nextElementSibling;
    const found = (kind, pattern) => [...svg.querySelectorAll(`path[data-${kind}]`)].flatMap(path =>
      [...path.getAttribute("d").matchAll(pattern)].map(([, x, n]) => [Number(x), path.dataset[kind], Number(n)]));
    const dots = found("verdict", /M([\d.]+)/g).sort(([a], [b]) => a - b);
    const places = dots.map(([x]) => x), chosen = dots.map(([, verdict]) => [verdict]);
    for (const [first, choice, length] of found("choice", /M(\d+) \d+h(\d+)/g))
      for (const choices of chosen.slice(first, first + length)) choices.push(choice);
    const guide = document.createElementNS(svg.namespaceURI, "path");
    guide.setAttribute("stroke", "currentColor");
    guide.setAttribute("stroke-width", "0.7");
    svg.append(guide);
    let at = -1;
    const show = index => {
      at = Math.min(Math.max(index, 0), places.length - 1);
      guide.setAttribute("d", `M${places[at]} 0V${svg.viewBox.baseVal.height}`);
      status.textContent = `${at + 1} of ${places.length}: ${chosen[at].join(", ")}`;
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
