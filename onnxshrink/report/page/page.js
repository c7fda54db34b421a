"use strict";
// The description of what is pointed at, or reached by keyboard, beside it; without this script the tables say the same.
const tip = document.getElementById("tip");
function show(event) {
  const found = event.target.closest("[data-tip]");
  tip.hidden = !found;
  if (!found) return;
  tip.textContent = found.dataset.tip;
  const place = found.getBoundingClientRect();
  const x = event.clientX || place.left + place.width / 2;
  const y = event.clientY || place.top;
  tip.style.left = Math.max(8, Math.min(x + 12, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (y + 18 + tip.offsetHeight < innerHeight ? y + 18 : Math.max(8, y - 12 - tip.offsetHeight)) + "px";
}
for (const name of ["pointerover", "pointermove", "focusin"]) document.addEventListener(name, show);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
// What the keyboard reaches is scrolled to; what the pointer was at has moved away.
addEventListener("scroll", () => { if (!tip.hidden) show({ target: document.activeElement }); }, { passive: true });
// On paper, tables are unfolded; those that say what a drawing shows are left to it.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll(".blocks > details:not([open])")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => { for (const part of folded) part.open = false; });
