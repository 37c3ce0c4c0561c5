// Controls of a Panel: for each one a native input, its symbol, one line of help and its fault.
// Values are texts.  A slider spells three digits; a number that is typed stays as it is.

const PAUSE = 40; // ms between messages while a slider moves

function position(control, text) {
  const { low, high, scale } = control.range;
  const value = Number(text);
  if (text.trim() === "" || Number.isNaN(value)) return low;
  const at = scale === "log" ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  return Math.min(1, Math.max(0, at));
}

function spelled(control, at) {
  const { low, high, scale } = control.range;
  const value = scale === "log" ? low * (high / low) ** at : low + (high - low) * at;
  return scale === "integer" ? String(Math.round(value)) : String(Number(value.toPrecision(3)));
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The inputs of one control; `show` writes a value into them.
function inputs(control, set) {
  const name = `${control.name} ${control.label}`;
  if (control.switch) {
    const box = element("input", { type: "checkbox", "aria-label": name });
    box.addEventListener("change", () => set(box.checked ? "on" : ""));
    return { parts: [box], show: (text) => (box.checked = text === "on") };
  }
  if (control.action) {
    const button = element("button", { type: "button" }, control.label);
    let count = 0;
    button.addEventListener("click", () => set(String(count + 1)));
    return { parts: [button], show: (text) => (count = Number(text)) };
  }
  if (control.buttons) {
    const group = Math.random().toString(36);
    const radios = control.choices.map(([value, words]) => {
      const radio = element("input", { type: "radio", name: group, value });
      radio.addEventListener("change", () => set(value));
      return [radio, element("label", {}, radio, words)];
    });
    const frame = element("div", { class: "buttons", role: "radiogroup", "aria-label": control.label }, ...radios.map(([, label]) => label));
    return { parts: [frame], show: (text) => radios.forEach(([radio]) => (radio.checked = radio.value === text)) };
  }
  if (control.choices.length) {
    const options = control.choices.map((choice) => element("option", { value: choice }, choice.replaceAll("_", " ")));
    const menu = element("select", { "aria-label": name }, ...options);
    menu.addEventListener("change", () => set(menu.value));
    return { parts: [menu], show: (text) => (menu.value = text) };
  }
  const typed = element("input", { type: "text", "aria-label": `${name}, typed`, spellcheck: "false" });
  typed.addEventListener("change", () => set(typed.value));
  if (!control.range) return { parts: [typed], show: (text) => (typed.value = text) };
  const whole = control.range.scale === "integer";
  const steps = whole ? control.range.high - control.range.low : 120;
  const slider = element("input", { type: "range", min: "0", max: String(steps), step: "1", "aria-label": name });
  slider.addEventListener("input", () => set(spelled(control, slider.value / steps)));
  const show = (text) => {
    if (typed.getRootNode().activeElement !== typed) typed.value = text;
    if (spelled(control, slider.value / steps) !== text) slider.value = position(control, text) * steps;
    slider.setAttribute("aria-valuetext", text);
  };
  return { parts: [slider, typed], show };
}

function render({ model, el }) {
  const root = element("div", { class: "panel" });
  let rows = [];
  let groups = new Map();
  let timer = null;
  let pending = null;

  const values = () => pending ?? model.get("values");
  const send = () => {
    timer = null;
    if (pending === null) return;
    model.set("values", pending);
    pending = null;
    model.save_changes();
    timer = setTimeout(send, PAUSE);
  };
  const set = (name, text) => {
    pending = { ...values(), [name]: text };
    refresh();
    if (timer === null) send();
  };

  function build() {
    rows = [];
    groups = new Map();
    for (const control of model.get("controls")) {
      const { parts, show } = inputs(control, (text) => set(control.name, text));
      const help = element("small", { class: "help" }, control.help);
      const fault = element("small", { class: "fault", role: "alert" });
      const label = element("span", { class: "label" }, control.label);
      const row = element("div", { class: "row", "data-field": control.name });
      if (control.switch) row.append(element("label", { class: "switch" }, ...parts, label));
      else if (control.action || control.buttons) row.append(...parts);
      else row.append(label, element("div", { class: "inputs" }, ...parts));
      if (control.help) row.append(help);
      row.append(fault);
      if (!groups.has(control.group)) groups.set(control.group, section(control.group));
      groups.get(control.group).append(row);
      rows.push({ control, row, show, fault, parts });
    }
    root.replaceChildren(...groups.values());
    refresh();
  }

  function section(name) {
    const title = model.get("titles")[name];
    if (title === undefined) return element("div", { class: "group line" });
    return element("details", { class: "group", open: "" }, element("summary", {}, title));
  }

  function refresh() {
    const now = values();
    const wrong = model.get("fault");
    const seen = new Set();
    for (const { control, row, show, fault, parts } of rows) {
      row.hidden = !control.needs.every(([name, allowed]) => allowed.includes(now[name]));
      if (!row.hidden) seen.add(control.group);
      show(now[control.name] ?? control.default);
      const text = wrong.name === control.name ? wrong.text : "";
      if (fault.textContent !== text) fault.textContent = text;
      for (const part of parts) part.setAttribute("aria-invalid", String(text !== ""));
    }
    for (const [name, group] of groups) group.hidden = !seen.has(name);
  }

  // what the kernel changes (a preset, an import) replaces what is pending
  const replaced = () => { pending = null; refresh(); };
  model.on("change:values", replaced);
  model.on("change:controls", build);
  model.on("change:fault", refresh);
  build();
  el.append(root);
  return () => {
    clearTimeout(timer);
    model.off("change:values", replaced);
    model.off("change:controls", build);
    model.off("change:fault", refresh);
  };
}

export default { render };
