function mend(box) {
  for (const list of box.querySelectorAll("select")) {
    list.setAttribute("data-lm-suppress-shortcuts", "true");
  }
  for (const handle of box.querySelectorAll(".noUi-handle")) {
    const slider = handle.closest(".widget-slider, .jupyter-widgets");
    const end = handle.matches(".noUi-handle-lower") ? "lowest" : "highest";
    const name = slider?.querySelector(".widget-label")?.textContent ?? "";
    handle.setAttribute("aria-label", `${name}, ${end}`);
  }
}
export default {
  render({ model, el }) {
    let box = null, empty = null, asked = null;
    const plot = () => box?.querySelector(".js-plotly-plot") ?? null;
    const drawn = () => plot()?.querySelector(".scatterlayer .trace");
    const changes = new MutationObserver(() => mend(box));
    // A plot that is still being drawn for the first time must be left alone.
    const fit = () => drawn() && window.dispatchEvent(new Event("resize"));
    const room = new ResizeObserver(() => {
      if (box === null && (box = el.closest(".heimdall-explore")) !== null) {
        mend(box);
        changes.observe(box, { childList: true, subtree: true });
      }
      fit();
    });
    room.observe(el);
    document.addEventListener("plotlywidget-after-render", fit);
    const watch = setInterval(() => {
      if (drawn()) return clearInterval(watch);
      // Twice the same one.
      if (plot() !== null && plot() === empty && plot() !== asked) {
        asked = plot();
        model.send({ kind: "empty" });
      }
      empty = plot();
    }, 4000);
    return () => {
      clearInterval(watch);
      room.disconnect();
      changes.disconnect();
      document.removeEventListener("plotlywidget-after-render", fit);
    };
  },
};
