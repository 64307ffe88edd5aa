// One tab stop for many items: arrow keys move inside, Enter or Space picks; hovering shows what focus shows.

export const explore = (host, items, columns, show, pick = () => {}) => {
  let now = 0;
  const reach = i => { items[now].tabIndex = -1; now = i; items[i].tabIndex = 0; };
  items.forEach((item, i) => { item.setAttribute("tabindex", i ? -1 : 0); item.dataset.i = i; });
  const index = event => event.target.dataset && event.target.dataset.i !== undefined ? +event.target.dataset.i : -1;
  host.addEventListener("pointerover", event => { if (index(event) >= 0) show(index(event)); });
  host.addEventListener("focusin", event => { if (index(event) >= 0) { reach(index(event)); show(now); } });
  host.addEventListener("click", event => { if (index(event) >= 0) { items[index(event)].focus(); pick(index(event)); } });
  host.addEventListener("keydown", event => {
    const moves = {ArrowLeft: now - 1, ArrowRight: now + 1, ArrowUp: now - columns, ArrowDown: now + columns,
                   Home: 0, End: items.length - 1};
    if (event.key === "Enter" || event.key === " ") pick(now);
    else if (event.key in moves) { if (items[moves[event.key]]) items[moves[event.key]].focus(); }
    else return;
    event.preventDefault();
  });
  return reach;
};
