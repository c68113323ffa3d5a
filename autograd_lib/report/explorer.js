// Runs once for each figure, on the element before the script itself.
(() => {
  const figure = document.currentScript.closest("figure");
  const {labels, lines, frames, alts} =
    JSON.parse(figure.querySelector("script").textContent);
  const picture = figure.querySelector("img");
  const controls = [...figure.querySelectorAll("input, select")];
  const show = () => {
    const at = controls.reduce((at, control, i) => at * labels[i].length + +control.value, 0);
    const svg = frames[at].map(line => lines[line]).join("\n");
    picture.src = "data:image/svg+xml," + encodeURIComponent(svg);
    picture.alt = alts[at];
    controls.forEach((control, i) => {
      const label = labels[i][control.value];
      if (control.type !== "range") return;
      control.setAttribute("aria-valuetext", label);
      control.nextElementSibling.value = label;
    });
  };
  controls.forEach(control => {
    control.dataset.lmSuppressShortcuts = true; // JupyterLab leaves the keys to it
    control.addEventListener("input", show);
  });
  show();
})();
