"use strict";
const root = document.documentElement, theme = document.getElementById("theme");
function setTheme(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  theme.setAttribute("aria-pressed", String(dark));
  theme.textContent = dark ? "Light" : "Dark";
}
setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
theme.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));

const form = document.getElementById("filters"), list = document.getElementById("cards");
const cards = [...list.children], count = document.getElementById("count"), none = document.getElementById("none");
const orders = {
  down: (a, b) => b.dataset.iou - a.dataset.iou,
  up: (a, b) => a.dataset.iou - b.dataset.iou,
  long: (a, b) => b.dataset.words - a.dataset.words,
};
function number(name, empty) {
  const value = parseFloat(form.elements[name].value);
  return Number.isNaN(value) ? empty : value;
}
function apply() {
  const exact = ["dataset", "split", "group"].map((name) => [name, form.elements[name].value]).filter(([, v]) => v);
  const [low, high] = [number("low", 0), number("high", 100)];
  const [shortest, longest] = [number("shortest", 0), number("longest", Infinity)];
  const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const d = card.dataset;
    const fits = exact.every(([name, value]) => d[name] === value) && d.iou >= low && d.iou <= high &&
      d.words >= shortest && d.words <= longest && words.every((word) => d.text.includes(word));
    card.hidden = !fits;
    shown += fits;
  }
  const order = orders[form.elements.order.value];
  list.append(...(order ? [...cards].sort(order) : cards));
  count.textContent = `${shown} of ${cards.length}`;
  none.hidden = shown > 0;
}
form.addEventListener("input", apply);
form.addEventListener("reset", () => setTimeout(apply));
form.addEventListener("submit", (event) => event.preventDefault());
apply();

const large = document.getElementById("large");
function enlarge(card) {
  const copy = card.cloneNode(true);
  copy.removeAttribute("tabindex");
  large.lastElementChild.replaceChildren(copy);
  large.showModal();
}
document.getElementById("close").addEventListener("click", () => large.close());
list.addEventListener("click", (event) => {
  const card = event.target.closest("article");
  if (card) enlarge(card);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || large.open) return;
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    form.elements.words.focus();
    return;
  }
  if (typing) return;
  const card = event.target.closest("article");
  if (event.key === "Enter" && card) {
    event.preventDefault(); // the key would press the Close button, which gets the focus
    enlarge(card);
  }
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const visible = [...list.children].filter((c) => !c.hidden);
  const next = visible[card ? visible.indexOf(card) + step : 0];
  if (next) {
    event.preventDefault();
    next.focus();
  }
});
