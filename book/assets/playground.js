/* The playground: recorded answers (PLAYGROUND, of playground-data.js) for what a reader chooses. The doses, half of it,
   are loaded when a reader comes near them.

   Three parts, each a form and a place for what is shown. What is chosen stands in the address, as in #edit=Canada, so
   that it can be linked to. No text of the data is read as HTML. */
(() => {
  "use strict";
  const { edits, neurons } = PLAYGROUND;
  const source = new URL("playground-doses.js", document.currentScript.src);
  const part = name => document.querySelector(`.playground[data-part="${name}"]`);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const grouped = (items, group, label) => {
    const groups = new Map();
    for (const [index, item] of items.entries()) {
      const name = group(item);
      if (!groups.has(name)) groups.set(name, make("optgroup", { label: name }));
      groups.get(name).append(make("option", { value: index }, label(item)));
    }
    return [...groups.values()];
  };
  const nameOf = {
    edit: item => item.subject,
    dose: item => `${item.task}: ${item.name}`,
    neuron: item => item.neuron,
  };
  const lists = { edit: edits, dose: [], neuron: neurons };
  const selects = {};
  const shows = {};

  function choose(kind, index, focus = false) {
    selects[kind].value = index;
    shows[kind](lists[kind][index]);
    if (focus) {
      selects[kind].focus();
      selects[kind].scrollIntoView({ block: "center" });
    }
  }
  const link = (kind, name, text) => {
    const anchor = make("a", { href: `#${kind}=${encodeURIComponent(name)}` }, text);
    anchor.addEventListener("click", event => { event.preventDefault(); follow(anchor.hash, true); });
    return anchor;
  };
  async function follow(hash, focus = false) {
    const [kind, name] = decodeURIComponent(hash.slice(1)).split(/=(.*)/s);
    if (kind === "dose") await loadDoses();
    const index = lists[kind]?.findIndex(item => nameOf[kind](item) === name) ?? -1;
    if (index < 0) return;
    history.replaceState(null, "", hash);
    choose(kind, index, focus);
  }
  function start(kind, name, options, show) {
    const select = selects[kind] = part(name).querySelector("select");
    select.append(...options);
    shows[kind] = show;
    select.addEventListener("change", () => {
      history.replaceState(null, "", `#${kind}=${encodeURIComponent(nameOf[kind](lists[kind][select.value]))}`);
      show(lists[kind][select.value]);
    });
    choose(kind, 0);
  }

  // ------------------------------------------------------------------------------------------------------ edits
  const begins = (text, word) => text.startsWith(word) && !/^\p{L}/u.test(text.slice(word.length));
  function showEdit(edit) {
    const box = part("edits");
    const radios = box.querySelector(".choices");
    const last = radios.querySelector("input:checked")?.value ?? "ROME";
    const editors = Object.keys(edit.says).filter(name => name !== "unedited");
    const chosen = editors.includes(last) ? last : editors[0];
    radios.replaceChildren(...editors.map(name => {
      const input = make("input", { type: "radio", name: "editor", value: name });
      input.checked = name === chosen;
      input.addEventListener("change", () => showAnswers(edit, name));
      return make("label", {}, input, ` ${name}`);
    }));
    const failed = Object.entries(edit.failed).map(([name, why]) => `${name} failed: ${why}.`).join(" ");
    box.querySelector(".request").replaceChildren(make("b", {}, edit.subject), `, ${edit.what}: `, make("s", {}, edit.old), " → ",
      make("b", {}, edit.new), failed && `. ${failed}`);
    showAnswers(edit, chosen);
  }
  function showAnswers(edit, editor) {
    const box = part("edits");
    const counts = new Map();
    const items = edit.questions.map((question, i) => {
      const says = edit.says[editor][i];
      // What was not said before the edit cannot be lost by it, nor be kept.
      const asked = !["as before", "no longer"].includes(question.due) || begins(edit.says.unedited[i], question.word);
      const right = begins(says, question.word) !== (question.due === "no longer");
      if (asked) {
        const [hits, all] = counts.get(question.kind) ?? [0, 0];
        counts.set(question.kind, [hits + right, all + 1]);
      }
      const sign = asked ? (right ? "✓" : "✕") : "·";
      const text = `${sign} ${question.due}${question.due === "no longer" ? "" : ":"} ${question.word}`;
      const due = make("small", { class: asked && right ? "right" : "" }, asked ? text : `${text} (not said before either)`);
      return make("li", {},
        make("p", {}, make("small", {}, question.kind), make("br"), make("i", {}, `${question.prompt} …`)),
        make("dl", {}, make("div", {}, make("dt", {}, "unedited"), make("dd", {}, edit.says.unedited[i])),
          make("div", {}, make("dt", {}, editor), make("dd", {}, says, make("br"), due))));
    });
    box.querySelector("ol").replaceChildren(...items);
    box.querySelector("[role=status]").textContent = `${editor}, as it should be: ` +
      [...counts].map(([kind, [hits, all]]) => `${kind} ${hits} of ${all}`).join("; ");
  }

  // ------------------------------------------------------------------------------------------------------ doses
  function showDose(dose) {
    const box = part("doses");
    const range = box.querySelector("input");
    range.max = dose.sizes.length - 1;
    if (Number(range.value) > range.max) range.value = 0;
    range.oninput = () => showSize(dose, Number(range.value));
    box.querySelector(".request").replaceChildren("In order of attribution: ",
      ...dose.neurons.flatMap(name => [neurons.some(item => item.neuron === name) ? link("neuron", name, name) : name, ", "]), "…");
    showSize(dose, Number(range.value));
  }
  function showSize(dose, at) {
    const box = part("doses");
    const size = dose.sizes[at];
    const text = size === 1 ? "1 neuron suppressed" : `${size} neurons suppressed`;
    box.querySelector("input").setAttribute("aria-valuetext", text);
    box.querySelector("output").textContent = text;
    box.querySelector("ol").replaceChildren(...dose.prompts.map(({ what, prompt, forms }, i) => {
      const { p, words } = dose.says[at][i];
      const shown = [...words, ...forms.map((word, form) => [word, p[form]]).filter(([word]) => !words.some(([other]) => other === word))];
      const bars = shown.map(([word, probability]) => {
        const bar = make("span", { class: "bar" });
        bar.style.width = `${100 * probability}%`;
        return make("div", { class: word === forms[0] ? "answer" : "" }, make("dt", {}, word),
          make("dd", {}, make("span", { class: "track" }, bar), ` ${probability < .001 ? "< .001" : number(probability)}`));
      });
      const before = dose.says[0][i].p;
      const change = forms.map((word, form) => `P(${word}) ${number(before[form])} → ${number(p[form])}`).join("; ");
      return make("li", {}, make("p", {}, make("small", {}, what), make("br"), make("i", {}, `${prompt} …`)),
        make("dl", {}, ...bars), make("small", {}, change));
    }));
  }
  const number = p => p < .01 ? p.toPrecision(1) : p.toFixed(2);

  // ---------------------------------------------------------------------------------------------------- neurons
  function showNeuron(neuron) {
    const box = part("neurons");
    const words = list => list.join(", ");
    const active = neuron.active.map(([before, token, activation]) =>
      make("li", {}, `… ${before} `, make("mark", {}, token), ` (${activation.toPrecision(2)})`));
    const found = neuron.found.map(([name, rank]) =>
      make("li", {}, link("dose", name, name), rank ? ` (its number ${rank})` : ""));
    box.querySelector("dl").replaceChildren(
      make("dt", {}, "Raises"), make("dd", {}, words(neuron.raises)),
      make("dt", {}, "Lowers"), make("dd", {}, words(neuron.lowers)),
      make("dt", {}, "Most active in prose"), make("dd", {}, make("ul", {}, ...active)),
      make("dt", {}, `Found for ${neuron.found.length}`), make("dd", {}, make("ul", {}, ...found)));
    box.querySelector("[role=status]").textContent = `Neuron ${neuron.neuron}`;
  }

  start("edit", "edits", grouped(edits, item => item.what, item => `${item.subject}: ${item.old} → ${item.new}`), showEdit);
  start("neuron", "neurons", grouped(neurons, item => `block ${item.neuron.split("·")[0]}`,
    item => `${item.neuron}, found for ${item.found.length}`), showNeuron);
  const box = part("doses");
  let loading;
  const loadDoses = () => loading ??= new Promise((done, failed) => {
    const script = make("script", { src: source });
    script.onload = () => {
      lists.dose = PLAYGROUND.doses;
      start("dose", "doses", grouped(lists.dose, item => item.task, item => item.name), showDose);
      done();
    };
    script.onerror = () => failed(new Error(`${source} could not be loaded`));
    document.head.append(script);
  });
  new IntersectionObserver(([entry], observer) => {
    if (entry.isIntersecting) { observer.disconnect(); loadDoses(); }
  }, { rootMargin: "300px" }).observe(box);
  box.addEventListener("focusin", loadDoses);
  addEventListener("hashchange", () => follow(location.hash, true));
  if (location.hash) follow(location.hash, true);
})();
