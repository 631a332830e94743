"use strict";

const byId = (id) => document.getElementById(id);

// A tooltip that describes a mark, beside the pointer.
{
  const tip = byId("tip");
  const hide = () => { tip.hidden = true; };
  document.addEventListener("pointerover", (event) => {
    const mark = event.target.closest("[data-tip]");
    if (!mark) return hide();
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const box = mark.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(0, left) + scrollX}px`;
    tip.style.top = `${(above > 0 ? above : box.bottom + 8) + scrollY}px`;
  });
  document.addEventListener("scroll", hide, { passive: true, capture: true });
}

// Highlight one method in all charts.
{
  const style = document.head.appendChild(document.createElement("style"));
  let kept = null;
  const show = (place) => {
    style.textContent = place === null ? "" : `.chart g[data-m]:not([data-m="${place}"]) { opacity: .12; }`;
  };
  for (const button of document.querySelectorAll("[data-focus]")) {
    button.addEventListener("pointerenter", () => show(button.dataset.focus));
    button.addEventListener("pointerleave", () => show(kept));
    button.addEventListener("click", () => {
      kept = kept === button.dataset.focus ? null : button.dataset.focus;
      for (const other of document.querySelectorAll("[data-focus]")) {
        other.setAttribute("aria-pressed", String(other.dataset.focus === kept));
      }
      show(kept);
    });
  }
}

// The table of runs: sort, filter, and show the first rows until the reader asks for all.
const runs = byId("runs-table") && (() => {
  const table = byId("runs-table");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const [filter, state, found, more] = ["runs-filter", "runs-state", "runs-found", "runs-more"].map(byId);
  const texts = new Map();
  let first = Number(table.dataset.first);
  let task = "";

  const text = (row) => {
    if (!texts.has(row)) texts.set(row, Array.from(row.cells, (cell) => cell.textContent).join(" ").toLowerCase());
    return texts.get(row);
  };
  const update = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const fits = (!task || row.dataset.task === task)
        && (!state.value || row.cells[row.cells.length - 1].textContent === state.value)
        && words.every((word) => text(row).includes(word));
      count += fits;
      row.hidden = !fits || count > first;
    }
    const shown = count > first ? `, the first ${first} shown` : "";
    found.textContent = `${count.toLocaleString("en")} ${count === 1 ? "run" : "runs"}${shown}`;
    if (more) {
      more.hidden = count <= first;
      more.textContent = `Show all ${count.toLocaleString("en")} runs`;
    }
  };
  const value = (row, column) => {
    const cell = row.cells[column];
    const known = cell.dataset.v ?? cell.textContent;
    const number = known.trim() === "" ? NaN : Number(known);
    return Number.isNaN(number) ? known : number;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b, "en", { numeric: true });
  };
  const sort = (column, direction) => {
    const keys = new Map(rows.map((row) => [row, value(row, column)]));
    const absent = (key) => key === "–";
    rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (absent(x) || absent(y)) return absent(x) - absent(y);
      return direction * compare(x, y);
    });
    body.append(...rows);
    update();
  };

  const headers = Array.from(table.tHead.rows[0].cells);
  headers.forEach((header, column) => header.addEventListener("click", () => {
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of headers) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    sort(column, descending ? -1 : 1);
  }));
  filter.addEventListener("input", update);
  state.addEventListener("change", update);
  more?.addEventListener("click", () => { first = Infinity; update(); });
  return { setTask(name) { task = name; update(); } };
})();

// Show a single task.
byId("task")?.addEventListener("change", (event) => {
  const task = event.target.value;
  for (const part of document.querySelectorAll(":is(figure, details, .findings li)[data-task]")) {
    part.hidden = task !== "" && part.dataset.task !== task;
  }
  runs?.setTask(task);
});

// A run: its configuration and the command that repeats it.
{
  const dialog = byId("run-dialog");
  const data = dialog && JSON.parse(byId("runs-data").textContent);
  const piece = (title, content, name) => {
    const part = document.createElement("div");
    part.className = name;
    part.append(Object.assign(document.createElement("h4"), { textContent: title }));
    const pre = document.createElement("pre");
    pre.append(Object.assign(document.createElement("code"), { textContent: content }));
    part.append(pre);
    if (name === "command") part.append(copyButton());
    return part;
  };
  const copyButton = () => Object.assign(document.createElement("button"), { type: "button", className: "action copy", textContent: "Copy" });
  const open = () => {
    const id = location.hash.startsWith("#run-") ? location.hash.slice(5) : null;
    const run = id && data && Object.hasOwn(data.runs, id) ? data.runs[id] : null;
    if (!run) {
      if (dialog?.open) dialog.close();
      return;
    }
    const toml = (run.toml ?? "") + data.shared.toml;
    const words = ["childtuning train", run.words, data.shared.words, `--output runs/${id}`].filter(Boolean);
    byId("run-title").textContent = `Run ${id}`;
    const body = byId("run-body");
    body.replaceChildren();
    for (const [title, content] of [["Error", run.error], ["Scores", run.metrics], ["Finished", run.finished]]) {
      if (content) body.append(piece(title, content, "command-less"));
    }
    body.append(piece("Command to repeat it", words.join(" "), "command"), piece("Configuration", toml, "config"));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  };
  addEventListener("hashchange", open);
  byId("run-close")?.addEventListener("click", () => dialog.close());
  dialog?.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog?.addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
  open();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".copy");
  if (!button) return;
  const text = button.parentElement.querySelector("pre").textContent;
  const done = (word) => { button.textContent = word; setTimeout(() => { button.textContent = "Copy"; }, 1500); };
  if (!navigator.clipboard) return done("Select and copy it by hand");
  navigator.clipboard.writeText(text).then(() => done("Copied"), () => done("Select and copy it by hand"));
});
