// Formulas. The page is told when they are set (book.css waits for it, so that nothing moves once it is seen). Those that
// are wider than the page scroll by themselves and can be reached by keyboard, as the theme does it for code and tables.
if (window.MathJax) {
  const update = () => {
    for (const formula of document.querySelectorAll("mjx-container[display]")) {
      const wide = formula.scrollWidth > formula.clientWidth;
      if (wide) Object.assign(formula, { tabIndex: 0, role: "group", ariaLabel: "Formula, scrollable" });
      else ["tabindex", "role", "aria-label"].forEach((name) => formula.removeAttribute(name));
    }
  };
  window.MathJax.startup = {
    pageReady: () =>
      window.MathJax.startup.defaultPageReady().then(() => {
        document.documentElement.classList.add("typeset");
        update();
        addEventListener("resize", update);
      }),
  };
}

// A page from disk may not read the others, from which the search takes its excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
