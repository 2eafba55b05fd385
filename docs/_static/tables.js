// A click on the head of a column sorts a long table by it, a second one the other way round.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.docutils")) {
    const body = table.tBodies[0];
    if (!table.tHead || !body || body.rows.length < 10) continue;
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const words = (row) => row.cells[column]?.textContent.trim() ?? "";
        const rows = [...body.rows].sort((one, two) =>
          words(one).localeCompare(words(two), "en", { numeric: true }) * (up ? 1 : -1));
        body.append(...rows);
      });
    });
  }
});
