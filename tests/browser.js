// What tests/test_browser.py asks of a page. All lists hold the beginnings of the elements that are not as they should be.
(() => {
  const brief = (elements) => [...elements].map((e) => e.outerHTML.slice(0, 160));
  const visible = (e) => e.checkVisibility({ visibilityProperty: true });

  // Fetches what else is fetched when a reader comes near it.
  async function fetch() {
    for (const image of document.images) image.loading = "eager";
    await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
  }

  function seen() {
    const named = (e) =>
      e.closest('[aria-hidden="true"], [role="presentation"]') ||
      ["alt", "aria-label", "aria-labelledby"].some((name) => e.getAttribute(name)?.trim()) ||
      [...e.children].some((child) => child.localName === "title");
    const graphics = [...document.querySelectorAll("img, svg")].filter((e) => !e.parentElement.closest("svg, mjx-container"));
    const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
    const sized = (e) => e.hasAttribute("width") && e.hasAttribute("height");
    return {
      unset: brief([...document.querySelectorAll(".math")].filter((e) => !e.querySelector("mjx-math"))),
      wrong: brief(document.querySelectorAll("mjx-merror, [data-mjx-error]")),
      nameless: brief(graphics.filter((e) => !named(e))),
      unloaded: brief([...document.images].filter((e) => visible(e) && !e.naturalWidth)),
      unsized: brief([...document.querySelectorAll("article img")].filter((e) => !sized(e))),
      twice: ids.filter((id, i) => ids.indexOf(id) !== i),
    };
  }

  // `wide`: reaches out of the window, not inside something that scrolls. `over`: lies on the block of text before it.
  function fits() {
    const scrolls = (e) =>
      e && e !== document.body && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
    const { clientWidth, scrollWidth } = document.documentElement;
    const wide = [...document.querySelectorAll("main *")].filter(
      (e) => visible(e) && e.getBoundingClientRect().right > clientWidth + 1 && !scrolls(e.parentElement),
    );
    const over = [];
    for (const parent of document.querySelectorAll("article, article section, article .cell, article .cell_output")) {
      let last = null;
      for (const e of parent.children) {
        const box = e.getBoundingClientRect();
        if (!visible(e) || !box.height || /absolute|fixed/.test(getComputedStyle(e).position)) continue;
        const across = last && box.left < last.right - 2 && box.right > last.left + 2;
        if (across && box.top < last.bottom - 2) over.push(e);
        last = box;
      }
    }
    return { wide: brief(wide), over: brief(over), body: scrollWidth, window: clientWidth };
  }

  // Serious and critical issues. Long tables have rows of one kind, and so has the reference entries: the first stand for
  // all.
  async function audit(rules) {
    const options = { resultTypes: ["violations"], preload: false };
    if (rules.length) options.runOnly = { type: "rule", values: rules };
    const { violations } = await axe.run({ exclude: ["tbody tr:nth-child(n + 13)", "dl.py:nth-of-type(n + 4)"] }, options);
    return violations
      .filter(({ impact }) => ["serious", "critical"].includes(impact))
      .flatMap(({ id, nodes }) => nodes.map((node) => `${id}: ${node.html.slice(0, 160)} ${node.failureSummary}`));
  }

  // From here on: what the focus has not reached (`missed`), and where it was that it could not be seen (`unseen`).
  function watch() {
    const look = (e) => {
      const names = ["outlineStyle", "outlineWidth", "outlineColor", "boxShadow", "borderColor", "backgroundColor"];
      return names.map((name) => getComputedStyle(e)[name]).join();
    };
    const kinds = "a[href], button, input, select, textarea, summary, [tabindex]";
    const able = [...document.querySelectorAll(kinds)].filter(
      (e) => e.tabIndex >= 0 && !e.disabled && visible(e) && !(e.type === "radio" && !e.checked),
    );
    const shown = (e) => (e.type === "radio" ? [...e.labels] : [e, ...e.children]); // tabs are labels of radio buttons
    const before = new Map(able.map((e) => [e, shown(e).map(look).join()]));
    const [reached, unseen] = [new Set(), new Set()];
    document.addEventListener("focusin", ({ target }) => {
      reached.add(target);
      const flat = shown(target).every((e) => !e.getBoundingClientRect().width || !e.getBoundingClientRect().height);
      if (flat || before.get(target) === shown(target).map(look).join()) unseen.add(target);
    });
    document.activeElement.blur();
    checks.missed = () => brief(able.filter((e) => !reached.has(e)));
    checks.unseen = () => brief(unseen);
    return able.length;
  }

  window.checks = { fetch, seen, fits, audit, watch };
})();
