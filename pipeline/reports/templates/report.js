// The page works without this; with it, tables are sorted, one model's curves stand out, and the
// models whose queries are shown change places.
for (const head of document.querySelectorAll("table.sorted thead th[data-column]")) {
  const button = head.querySelector("button");
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    const table = head.closest("table");
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const column = Number(head.dataset.column);
    const value = (row) => Number.parseFloat(row.cells[column].dataset.value ?? row.cells[column].textContent);
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => row.cells.length > column);
      rows.sort((a, b) => ((value(b) || 0) - (value(a) || 0)) * (down ? 1 : -1));
      body.append(...rows);
    }
  });
}

const chosen = document.getElementById("model");
function choose() {
  for (const part of document.querySelectorAll("[data-gallery]")) part.hidden = part.dataset.gallery !== chosen.value;
}
if (chosen) {
  chosen.addEventListener("change", choose);
  choose();
}

for (const row of document.querySelectorAll("[data-model]")) {
  const mark = (on) => () => {
    for (const line of document.querySelectorAll("svg [class^=model-]")) line.classList.toggle("dim", on && !line.classList.contains(row.dataset.model));
  };
  row.addEventListener("pointerenter", mark(true));
  row.addEventListener("pointerleave", mark(false));
  row.addEventListener("focusin", mark(true));
  row.addEventListener("focusout", mark(false));
}
