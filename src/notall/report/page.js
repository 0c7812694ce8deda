"use strict";
const { next, specs, themes, plans, csv, followers } = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");
const slider = document.getElementById("plan");
const SHEET = 1047; // pixels across a landscape A4 within its margins
const LEAST_FIT = 0.75; // of letters in print, before lines are broken
const views = {};

const say = (element, text) => {
  const before = element.textContent;
  element.textContent = text;
  setTimeout(() => (element.textContent = before), 1500);
};

async function draw() {
  const name = dark.matches ? "dark" : "light";
  const legend = { ...themes[name].legend, ...(narrow.matches && { orient: "bottom", columns: 2, labelLimit: 110, layout: { bottom: { direction: "vertical", anchor: "start" } } }) };
  const config = { ...themes[name], legend };
  for (const [id, spec] of Object.entries(specs)) {
    views[id]?.finalize();
    const options = { config, renderer: "svg", actions: false, tooltip: { theme: name } };
    views[id] = (await vegaEmbed("#" + id, spec, options)).view;
  }
  for (const id of followers) views[id].addEventListener("click", (_, item) => item?.datum?.plan !== undefined && step(item.datum.plan));
  await step(slider ? +slider.value : 0);
  document.body.dataset.theme = name;
  document.body.dataset.drawn = Object.keys(views).length;
}

// Makes plan number `plan` the one that the map, the bars, the ring and the table show.
async function step(plan) {
  const shown = plans[Math.max(0, Math.min(plans.length - 1, plan))];
  if (!shown || !slider) return;
  slider.value = plans.indexOf(shown);
  slider.setAttribute("aria-valuetext", shown.name);
  document.getElementById("plan-name").textContent = shown.name;
  document.getElementById("plan-told").textContent = shown.told;
  document.getElementById("previous").disabled = +slider.value === 0;
  document.getElementById("next").disabled = +slider.value === plans.length - 1;
  for (const row of document.querySelectorAll("tr[data-plan]")) row.classList.toggle("chosen", row.dataset.plan === slider.value);
  await views.map?.signal("skipped", shown.skipped).signal("prompt", shown.prompt).runAsync();
  reveal([...shown.skipped, ...shown.prompt]);
  for (const id of followers) await views[id].signal("plan", +slider.value).runAsync();
}

// Scrolls a map that is wider than the screen to what is skipped.
function reveal(skipped) {
  const box = document.getElementById("map")?.parentElement;
  const layers = skipped.map((name) => +name.split(".")[1]);
  if (box && layers.length) box.scrollLeft = (Math.min(...layers) / +box.dataset.layers) * box.scrollWidth - 60;
}

function sort(heading) {
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const order = heading.ariaSort === "ascending" ? "descending" : "ascending";
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // what is absent comes last, either way
    const difference = Number(a) - Number(b);
    return sign * (Number.isNaN(difference) ? a.localeCompare(b) : difference);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b))));
}

function filter(input) {
  const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
  const words = input.value.toLowerCase().split(/\s+/);
  for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  const shown = rows.filter((row) => !row.hidden).length;
  const count = document.querySelector(`[data-count="${CSS.escape(input.dataset.filter)}"]`);
  count.textContent = (shown === rows.length ? "" : `${shown} of `) + `${rows.length} row${rows.length === 1 ? "" : "s"}`;
}

function save(url, name) {
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
}

async function copy(button, text, otherwise) {
  try {
    await navigator.clipboard.writeText(text);
    say(button, "copied");
  } catch { // no clipboard for this page
    otherwise();
  }
}

const onEach = (selector, event, act) => {
  for (const element of document.querySelectorAll(selector)) element.addEventListener(event, () => act(element));
};
onEach("table.sortable th button", "click", (button) => sort(button.parentElement));
onEach("[data-filter]", "input", filter);
onEach("[data-as]", "click", async ({ dataset: { figure, as } }) => save(await views[figure].toImageURL(as, 2), `${figure}.${as}`));
onEach("[data-copy]", "click", (button) => {
  const name = button.dataset.copy;
  copy(button, csv[name], () => {
    save("data:text/csv;charset=utf-8," + encodeURIComponent(csv[name]), name + ".csv");
    say(button, "saved");
  });
});
onEach("#copy-next", "click", (button) => copy(button, next, () => getSelection().selectAllChildren(document.querySelector("#message code"))));
onEach("[data-show]", "click", (button) => step(+button.dataset.show).then(() => document.getElementById("plans").scrollIntoView()));
onEach("#plan", "input", () => step(+slider.value));
onEach("#previous", "click", () => step(+slider.value - 1));
onEach("#next", "click", () => step(+slider.value + 1));
// Makes the letters of tables that are wider than a sheet smaller, and smaller still where breaking lines is not enough.
function fitTables() {
  for (const table of document.querySelectorAll("table")) {
    const whole = SHEET / table.scrollWidth;
    table.classList.add("narrowest");
    const broken = SHEET / table.scrollWidth;
    table.classList.remove("narrowest");
    table.style.setProperty("--fit", Math.min(1, Math.max(whole, Math.min(broken, LEAST_FIT))));
  }
}
addEventListener("beforeprint", fitTables);
let drawing = draw(); // one after the other: colours and width may change at once
for (const query of [dark, narrow]) query.addEventListener("change", () => (drawing = drawing.then(draw)));
