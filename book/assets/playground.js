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
  function start(kind, name, options, show, first = 0) {
    const select = selects[kind] = part(name).querySelector("select");
    select.append(...options);
    shows[kind] = show;
    select.addEventListener("change", () => {
      history.replaceState(null, "", `#${kind}=${encodeURIComponent(nameOf[kind](lists[kind][select.value]))}`);
      show(lists[kind][select.value]);
    });
    choose(kind, first);
  }

  // ------------------------------------------------------------------------------------------------------ edits
  const letter = /\p{L}/u;
  // Whether the first sentence has the word, as a whole word.
  const says = (text, word) => {
    const sentence = text.split(/[.!?;]/, 1)[0];
    const at = sentence.indexOf(word);
    return at >= 0 && !letter.test(sentence[at - 1] ?? " ") && !letter.test(sentence[at + word.length] ?? " ");
  };
  const repeats = text => text.split(" ").length > 5 && new Set(text.split(" ")).size < 3;
  // Why an answer is not counted, if it is not: what was not said before an edit cannot be lost by it, nor be kept.
  function uncounted(question, before, after) {
    if (repeats(after)) return "the model repeats itself";
    const kept = ["as before", "no longer"].includes(question.due);
    return kept && !says(before, question.word) ? `the unedited model does not say ${question.word}` : "";
  }
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
      const [before, after] = [edit.says.unedited[i], edit.says[editor][i]];
      const why = uncounted(question, before, after);
      const right = says(after, question.word) !== (question.due === "no longer");
      const [hits, all] = counts.get(question.kind) ?? [0, 0];
      if (!why) counts.set(question.kind, [hits + right, all + 1]);
      const due = `${question.due}${question.due === "no longer" ? "" : ":"} ${question.word}`;
      const mark = make("small", { class: right && !why ? "right" : "" },
        why ? `· not counted: ${why}` : `${right ? "✓" : "✕"} ${due}`);
      return make("li", {},
        make("p", {}, make("small", {}, question.kind), make("br"), make("i", {}, `${question.prompt} …`)),
        make("dl", {}, make("div", {}, make("dt", {}, "unedited"), make("dd", {}, before)),
          make("div", {}, make("dt", {}, editor), make("dd", {}, after, make("br"), mark))));
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
      const before = dose.says[0][i].p;
      const bars = words.map(([word, probability]) => bar(
        word !== forms[0] && forms[0].startsWith(word) && probability === p[0] ? `${word}… (${forms[0]})` : word, probability,
        forms[0].startsWith(word) && probability === p[0]));
      if (forms.length > 1) bars.push(bar("right form", p[0] / (p[0] + p[1]), true));
      else if (!bars.some(one => one.className)) bars.push(bar(forms[0], p[0], true));
      const odds = ([right, wrong]) => Math.log(right / wrong).toFixed(1);
      const change = forms.length > 1 ? `log-odds of ${forms[0]} against ${forms[1]}: ${odds(before)} → ${odds(p)}`
        : `P(${forms[0]}): ${number(before[0])} → ${number(p[0])}`;
      return make("li", {}, make("p", {}, make("small", {}, what), make("br"), make("i", {}, `${prompt} …`)),
        make("dl", {}, ...bars), make("small", {}, change));
    }));
  }
  const number = p => p < .001 ? "< .001" : p < .01 ? p.toFixed(3) : p.toFixed(2);
  function bar(label, p, isAnswer) {
    const drawn = make("span", { class: "bar" });
    drawn.style.width = `${100 * p}%`;
    return make("div", isAnswer ? { class: "answer" } : {}, make("dt", {}, label),
      make("dd", {}, make("span", { class: "track" }, drawn), ` ${number(p)}`));
  }

  // ---------------------------------------------------------------------------------------------------- neurons
  function showNeuron(neuron) {
    const box = part("neurons");
    const words = list => list.join(", ");
    const active = neuron.active.map(([before, token, activation]) =>
      make("li", {}, `… ${before} `, make("mark", {}, token), ` (${activation.toPrecision(2)})`));
    const found = neuron.found.map(([name, rank]) =>
      make("li", {}, link("dose", name, name), ` (${rank ? `rank ${rank}` : "rank above 100"})`));
    box.querySelector("dl").replaceChildren(
      make("dt", {}, "Raised where the activation is positive, lowered where it is negative"), make("dd", {}, words(neuron.raises)),
      make("dt", {}, "Lowered where it is positive, raised where it is negative"), make("dd", {}, words(neuron.lowers)),
      make("dt", {}, "Largest activations in prose, of either sign"), make("dd", {}, make("ul", {}, ...active)),
      make("dt", {}, "Found for, with its rank by mean attribution"), make("dd", {}, make("ul", {}, ...found)));
    box.querySelector("[role=status]").textContent =
      `Neuron ${neuron.neuron}, found by the search for ${neuron.found.length} facts or conditions`;
  }

  start("edit", "edits", grouped(edits, item => item.what, item => `${item.subject}: ${item.old} → ${item.new}`), showEdit,
    Math.max(0, edits.findIndex(edit => edit.questions.every((question, i) =>
      !uncounted(question, edit.says.unedited[i], edit.says.ROME?.[i] ?? "") && says(edit.says.unedited[0], edit.old)))));
  start("neuron", "neurons", grouped(neurons, item => `block ${item.neuron.split("·")[0]}`,
    item => `${item.neuron}, found for ${item.found.length}`), showNeuron);
  const box = part("doses");
  let loading;
  const loadDoses = () => loading ??= new Promise((done, failed) => {
    const script = make("script", { src: source });
    script.onload = () => {
      lists.dose = PLAYGROUND.doses;
      start("dose", "doses", grouped(lists.dose, item => item.task, nameOf.dose), showDose);
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
