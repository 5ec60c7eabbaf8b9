"use strict";
// Sorts, filters and searches the table that stands in the page.
(() => {
  const table = document.getElementById("releases");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => ({
    row,
    text: "",
    state: row.dataset.state,
    model: row.dataset.model,
    aliases: row.dataset.alias.split(" "),
  }));
  const field = (id) => document.getElementById(id);
  const value = (id) => field(id)?.value ?? "";
  const collator = new Intl.Collator("en", { numeric: true });

  const key = (entry, column) => {
    const text = entry.row.cells[column].dataset.sort;
    if (text === "") return null;
    const number = Number(text === "inf" ? "Infinity" : text);
    return Number.isNaN(number) ? text : number;
  };

  // What has no value comes last in either direction.
  const compare = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a === "number" && typeof b === "number") return sign * (a - b || 0);
    return sign * collator.compare(a, b);
  };

  const sort = (header) => {
    const before = header.getAttribute("aria-sort");
    const turned = before === "ascending" ? "descending" : "ascending";
    const direction = before ? turned : (header.dataset.first ?? "ascending");
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const keyed = rows.map((entry) => [key(entry, header.cellIndex), entry]);
    keyed.sort(([a], [b]) => compare(a, b, sign));
    body.replaceChildren(...keyed.map(([, entry]) => entry.row));
  };

  const filter = () => {
    const words = value("search").toLowerCase().split(/\s+/).filter(Boolean);
    const [state, model, alias] = ["state", "model", "alias"].map(value);
    let shown = 0;
    for (const entry of rows) {
      if (words.length) entry.text ||= searched(entry.row);
      const matches =
        (!state || entry.state === state) &&
        (!model || entry.model === model) &&
        (!alias || entry.aliases.includes(alias)) &&
        words.every((word) => entry.text.includes(word));
      entry.row.hidden = !matches;
      shown += matches;
    }
    for (const card of document.querySelectorAll(".curves article"))
      card.hidden = Boolean(model) && card.dataset.model !== model;
    field("shown").value = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    field("nothing").hidden = shown > 0 || rows.length === 0;
  };

  const searched = (row) => `${row.textContent} ${row.dataset.more}`.toLowerCase();

  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sort(header));
    header.append(button);
  }
  const form = field("controls");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  form.hidden = false;
  filter();
})();
