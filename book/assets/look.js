/* Interactive figures and the filter of the claims.

   A page holds pictures; below a cell with pictures that can be looked into stands <div class="look"> with a Vega-Lite
   specification. Vega is loaded only where there is one, from this book's own files, and draws in the picture's place.
   No text of the page is run as a script: Vega's expressions go through its interpreter. */
(() => {
  "use strict";
  const here = new URL("vega/", document.currentScript.src);
  const wide = () => window.innerWidth >= 640;
  const hint = "Point at the figure for numbers, click to pin them. With keys: arrows move, Enter pins, Escape unpins.";

  let library;
  const loadVega = () => library ??= ["vega", "vega-lite", "vega-embed"].reduce((before, name) => before.then(() =>
    new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = new URL(`${name}.min.js`, here);
      script.onload = done;
      script.onerror = () => failed(new Error(`${script.src} could not be loaded`));
      document.head.append(script);
    })), Promise.resolve());

  const make = (tag, attributes = {}, text = "") => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  };

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const of = name => style.getPropertyValue(`--pst-color-${name}`).trim();
    const dark = document.documentElement.dataset.theme === "dark";
    const text = { labelColor: of("text-base"), titleColor: of("text-base"), labelFontSize: 11, titleFontSize: 12,
      titleFontWeight: "normal" };
    const diverging = dark ? ["#7cc0ff", "#3d78ab", "#22272e", "#b5543f", "#ff9274"]
      : ["#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b"];
    return { ink: of("text-base"), neutral: diverging[2], config: {
      background: null, font: getComputedStyle(document.body).fontFamily, range: { diverging },
      axis: { ...text, gridColor: of("border"), domainColor: of("text-muted"), tickColor: of("text-muted") },
      header: { ...text, labelFontSize: 12 }, legend: { ...text, orient: wide() ? "right" : "bottom" }, view: { stroke: of("border") } } };
  }

  function look(place) {
    const spec = JSON.parse(place.querySelector("script").textContent);
    const cell = place.previousElementSibling.matches(".look") ? place.previousElementSibling.cell
      : place.previousElementSibling;
    place.cell = cell;
    const picture = cell.querySelectorAll(".cell_output img")[place.dataset.figure];
    const figure = picture.closest("figure") ?? picture.parentElement;
    const number = figure.querySelector(".caption-number")?.textContent.trim() ?? "the figure";
    const chart = make("div", { class: "look-chart", tabindex: "0", role: "application", hidden: "",
      "aria-label": `${number}, to look into: ${picture.alt} ${hint}` });
    const bar = make("div", { class: "look-bar" });
    const button = make("button", { type: "button", class: "look-toggle" }, "Look closer");
    button.setAttribute("aria-label", `Look closer: ${number}`);
    const controls = make("div", { class: "look-controls" });
    const status = make("p", { class: "look-status", role: "status" });
    const pins = make("table", { class: "look-pins table", hidden: "", "aria-label": `Pinned, ${number}` });
    bar.append(button, controls, status);
    place.append(bar, pins);
    picture.after(chart);
    place.dataset.state = "picture";

    let view, at = 0;
    const pinned = new Map();
    // The rows that can be told: marks with a tooltip, where they stand on the page of the chart.
    const marks = () => {
      const found = [];
      const walk = (item, x, y) => {
        for (const group of item.items ?? []) {
          const [left, top] = item.marktype === "group" ? [x + (group.x ?? 0), y + (group.y ?? 0)] : [x, y];
          if (group.items) walk(group, left, top);
          else if (item.marktype && group.tooltip && group.datum?.row && !group.isVoronoi) {
            const { x1, x2, y1, y2 } = group.bounds;
            found.push({ row: group.datum.row, told: group.tooltip, x: x + (x1 + x2) / 2, y: y + (y1 + y2) / 2 });
          }
        }
      };
      walk(view.scenegraph().root, 0, 0);
      return found;
    };
    const say = told => Object.entries(told).map(([name, value]) => `${name} ${value}`).join("; ");
    const show = row => {
      if (row === at || !view) return;
      at = row;
      view.signal("on", row).runAsync();
    };
    const unpin = row => {
      pinned.delete(row);
      status.textContent = pinned.size ? `${pinned.size} pinned` : hint;
      list();
    };
    function list() {
      view?.signal("pinned", [...pinned.keys()]).runAsync();
      pins.replaceChildren();
      pins.hidden = !pinned.size;
      if (!pinned.size) return;
      const heads = make("tr");
      for (const name of Object.keys([...pinned.values()][0])) heads.append(make("th", { scope: "col" }, name));
      heads.append(make("td"));
      pins.createTHead().append(heads);
      const body = pins.createTBody();
      for (const [row, told] of pinned) {
        const line = body.insertRow();
        for (const value of Object.values(told)) line.insertCell().textContent = value;
        const off = make("button", { type: "button", class: "look-unpin", "aria-label": `Unpin ${say(told)}` }, "×");
        off.addEventListener("click", () => { unpin(row); chart.focus(); });
        line.insertCell().append(off);
      }
    }
    const pin = (row, told) => {
      if (pinned.has(row)) return unpin(row);
      pinned.set(row, told);
      status.textContent = `Pinned: ${say(told)}`;
      list();
    };
    // The row of what is under the pointer; of the nearest mark where Vega has laid cells around them.
    const under = item => item?.tooltip && (item.datum?.row ?? item.datum?.datum?.row);

    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    chart.addEventListener("keydown", event => {
      if (!view) return;
      if (event.key in steps) {
        const all = marks(), now = all.find(mark => mark.row === at);
        let next = all.reduce((best, mark) => mark.row < best.row ? mark : best);
        if (now) {
          const [dx, dy] = steps[event.key];
          const far = mark => {
            const along = (mark.x - now.x) * dx + (mark.y - now.y) * dy;
            const aside = Math.abs((mark.x - now.x) * dy) + Math.abs((mark.y - now.y) * dx);
            return along > .5 ? along + 3 * aside : Infinity;
          };
          next = all.reduce((best, mark) => far(mark) < far(best) ? mark : best);
          if (far(next) === Infinity) next = now;
        }
        status.textContent = say(next.told);
        show(next.row);
      } else if (event.key === "Enter" || event.key === " ") {
        const now = marks().find(mark => mark.row === at);
        if (now) pin(now.row, now.told);
      } else if (event.key !== "Escape") return;
      else if (pinned.size) unpin([...pinned.keys()].pop());
      event.preventDefault();
    });
    pins.addEventListener("keydown", event => {
      if (event.key !== "Escape" || !pinned.size) return;
      unpin([...pinned.keys()].pop());
      (pins.querySelector("button") ?? chart).focus();
    });

    // Grow or shrink the panels until the chart fills the picture's place; on narrow screens it is as tall as it needs.
    async function fit(width, height) {
      const [across, up] = spec.facet ? ["child_width", "child_height"] : ["width", "height"];
      const columns = wide() ? spec.columns ?? 1 : 1;
      for (let round = 0; round < 3; round++) {
        const drawn = chart.querySelector("canvas").getBoundingClientRect();
        view.signal(across, Math.max(80, view.signal(across) + (width - drawn.width) / columns));
        if (wide()) view.signal(up, Math.max(80, view.signal(up) + height - drawn.height));
        await view.resize().runAsync();
      }
    }
    let size;
    async function draw() {
      const told = colours(), mine = structuredClone(spec), columns = wide() ? 4 : 1;
      const set = { ink: told.ink, pinned: [...pinned.keys()], columns };
      for (const one of mine.params) {
        if (one.name in set) one.value = set[one.name];
        else if (view && one.bind) one.value = view.signal(one.name);
      }
      if (!wide() && mine.facet) mine.columns = 1;
      if (place.dataset.look === "attribution-map") mine.view = { fill: told.neutral };
      view?.finalize();
      controls.replaceChildren();
      const canvas = make("div");
      const result = await window.vegaEmbed(canvas, { ...mine, config: told.config },
        { mode: "vega-lite", renderer: "canvas", actions: false, ast: true, defaultStyle: false, bind: controls,
          tooltip: { disableDefaultStyle: true, theme: "custom" } });
      chart.replaceChildren(canvas);
      place.view = view = result.view;
      at = 0;
      await fit(...size);
      view.addEventListener("pointermove", (_, item) => show(under(item) || 0));
      view.addEventListener("pointerout", () => show(0));
      view.addEventListener("click", (_, item) => under(item) && pin(under(item), item.tooltip));
    }

    async function closer() {
      if (place.dataset.state !== "picture") return;
      const box = picture.getBoundingClientRect();
      place.dataset.state = "loading";
      try {
        await loadVega();
      } catch (error) {
        library = undefined;
        place.dataset.state = "picture";
        status.textContent = error.message;
        return;
      }
      chart.hidden = false;
      chart.style.height = wide() ? `${box.height}px` : ""; // nothing below moves while the chart finds its size
      figure.classList.add("looking");
      size = [wide() ? box.width : chart.clientWidth, box.height];
      await draw();
      place.dataset.state = "closer";
      button.textContent = "Show the picture";
      button.setAttribute("aria-label", `Show the picture: ${number}`);
      status.textContent = hint;
    }
    function back() {
      if (place.dataset.state !== "closer") return;
      figure.classList.remove("looking");
      chart.hidden = true;
      place.dataset.state = "picture";
      button.textContent = "Look closer";
      button.setAttribute("aria-label", `Look closer: ${number}`);
      status.textContent = "";
      pinned.clear();
      list();
      controls.replaceChildren();
    }
    button.addEventListener("click", () => place.dataset.state === "picture" ? closer() : back());

    const again = () => place.dataset.state === "closer" && draw();
    new MutationObserver(again).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    let settled, width = window.innerWidth;
    window.addEventListener("resize", () => {
      clearTimeout(settled);
      settled = setTimeout(() => {
        if (window.innerWidth === width) return; // a phone's bars come and go: the height alone changes nothing
        width = window.innerWidth;
        if (place.dataset.state !== "closer") return;
        back();
        closer();
      }, 200);
    });
    if (wide()) new IntersectionObserver((seen, observer) => {
      if (!seen.some(one => one.isIntersecting)) return;
      observer.disconnect();
      closer();
    }, { rootMargin: "600px" }).observe(picture);
  }

  function claims(form) {
    const shown = document.getElementById("claims-shown"), fields = form.elements;
    const claims = [...document.querySelectorAll("table.matrix > tbody")]; // the first row of each is the claim
    function filter() {
      const words = fields.text.value.toLowerCase().split(/\s+/).filter(Boolean);
      const classes = [fields.verdict.value, fields["speaks-for"].value].filter(Boolean), model = fields.model.value;
      let left = 0;
      for (const claim of claims) {
        const [head, ...rows] = claim.rows, said = head.textContent.toLowerCase();
        for (const row of rows) row.hidden = !(classes.every(name => row.classList.contains(name))
          && (!model || row.dataset.model.split("|").includes(model)));
        claim.hidden = !(words.every(word => said.includes(word)) && rows.some(row => !row.hidden)
          && (!fields.chapter.value || claim.dataset.chapter === fields.chapter.value));
        left += !claim.hidden;
      }
      shown.textContent = `${left} of ${claims.length} claims and checks`;
    }
    form.addEventListener("input", filter);
    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(filter));
    filter();
  }

  // The marks of a table are one stop of the Tab key; arrows move between them.
  function marks(table) {
    const links = [...table.querySelectorAll("a.mark")];
    const inCell = (row, column) => [...row.cells[column]?.querySelectorAll("a.mark") ?? []];
    links.forEach((link, i) => { link.tabIndex = i ? -1 : 0; });
    table.addEventListener("keydown", event => {
      const from = links.indexOf(event.target), across = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const down = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
      if (from < 0 || !(across || down)) return;
      let next = links[from + across];
      if (down) {
        const column = event.target.closest("td").cellIndex;
        let row = event.target.closest("tr");
        const at = inCell(row, column).indexOf(event.target);
        do row = row[down]; while (row && !inCell(row, column).length);
        if (row) next = inCell(row, column).at(at) ?? inCell(row, column).at(-1);
      }
      event.preventDefault();
      if (!next) return;
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll("div.look").forEach(look);
    document.querySelectorAll("table.marks").forEach(marks);
    document.querySelectorAll("#claims-filter").forEach(claims);
  });
})();
