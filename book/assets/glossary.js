// A link to a term of the glossary shows its definition (TERMS, by anchor), and the mark of a verdict its words, while
// pointer or keyboard rest on it.
document.addEventListener("DOMContentLoaded", () => {
  const hint = document.createElement("div");
  hint.id = "term-hint";
  hint.setAttribute("role", "tooltip");
  hint.hidden = true;
  document.body.append(hint);
  let owner = null, leaving = 0;
  const hide = () => {
    clearTimeout(leaving);
    hint.hidden = true;
    owner?.removeAttribute("aria-describedby");
    owner = null;
  };
  const later = () => { clearTimeout(leaving); leaving = setTimeout(hide, 200); }; // time to move onto the hint
  const show = (link, text) => {
    hide();
    owner = link;
    hint.textContent = text;
    hint.hidden = false;
    link.setAttribute("aria-describedby", hint.id);
    const box = link.getClientRects()[0], width = document.documentElement.clientWidth;
    hint.style.left = `${Math.max(8, Math.min(box.left, width - hint.offsetWidth - 8)) + scrollX}px`;
    const below = box.bottom + hint.offsetHeight + 8 < innerHeight;
    hint.style.top = `${(below ? box.bottom + 4 : box.top - hint.offsetHeight - 4) + scrollY}px`;
  };
  for (const link of document.querySelectorAll('a[href*="#term-"], .mark[aria-label]')) {
    const isMark = link.classList.contains("mark");
    const text = isMark ? link.getAttribute("aria-label") : TERMS[decodeURIComponent(link.hash.slice(1))];
    if (!text || link.classList.contains("headerlink")) continue;
    if (!isMark) link.classList.add("term");
    link.addEventListener("mouseenter", () => show(link, text));
    link.addEventListener("focus", () => show(link, text));
    link.addEventListener("mouseleave", later);
    link.addEventListener("blur", hide);
  }
  hint.addEventListener("mouseenter", () => clearTimeout(leaving));
  hint.addEventListener("mouseleave", later);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
});
