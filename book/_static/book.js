// Everything that a page does by itself: theme, navigation, copying, wide content, printing.
// Without this file the page still reads, links, folds and searches.
"use strict";

const root = document.documentElement;
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// --- theme: the system's, then light, then dark ------------------------------------------------
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const themeButton = document.querySelector(".theme-switch-button");
const MODES = { auto: "follow the system", light: "light", dark: "dark" };

function applyMode(mode) {
  root.dataset.mode = mode;
  root.dataset.theme = mode === "auto" ? (systemDark.matches ? "dark" : "light") : mode;
  themeButton.setAttribute("aria-label", `Color theme: ${MODES[mode]}`);
  themeButton.title = `Color theme: ${MODES[mode]}`;
}

themeButton.addEventListener("click", () => {
  const modes = Object.keys(MODES);
  const mode = modes[(modes.indexOf(root.dataset.mode) + 1) % modes.length];
  applyMode(mode);
  try {
    localStorage.setItem("mode", mode);
  } catch (error) {
    // Storage is switched off: the choice holds for this page only.
  }
});
systemDark.addEventListener("change", () => applyMode(root.dataset.mode));
applyMode(root.dataset.mode in MODES ? root.dataset.mode : "auto");

// --- navigation --------------------------------------------------------------------------------
const menuButton = document.querySelector(".primary-toggle");
const siteNav = document.getElementById("site-nav");

function showMenu(shown) {
  root.classList.toggle("menu-open", shown);
  menuButton.setAttribute("aria-expanded", shown);
  if (shown) (siteNav.querySelector("a.current") || siteNav.querySelector("a")).focus();
}

menuButton.addEventListener("click", () => showMenu(!root.classList.contains("menu-open")));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && root.classList.contains("menu-open")) {
    showMenu(false);
    menuButton.focus();
  }
  const typing = /^(input|select|textarea)$/i.test(event.target.tagName);
  const slash = event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey;
  const ctrlK = event.key === "k" && (event.ctrlKey || event.metaKey);
  const field = document.querySelector(".bd-search input");
  if ((slash || ctrlK) && field && field.offsetParent) {
    event.preventDefault();
    field.focus();
    field.select();
  }
});
document.addEventListener("click", (event) => {
  const outside = !event.target.closest("#site-nav, .primary-toggle");
  if (root.classList.contains("menu-open") && outside) showMenu(false);
});

// The list of sections stands open where there is room for it beside the text.
const pageToc = document.querySelector(".bd-sidebar-secondary details");
if (pageToc) {
  const roomy = matchMedia("(min-width: 1200px)");
  const place = () => (pageToc.open = roomy.matches);
  roomy.addEventListener("change", place);
  place();
  const links = new Map(
    all("a[href^='#']", pageToc).map((link) => [
      document.getElementById(decodeURIComponent(link.hash.slice(1))),
      link,
    ]),
  );
  const visible = new Set();
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) visible[entry.isIntersecting ? "add" : "delete"](entry.target);
      const current = [...links.keys()].filter((section) => visible.has(section)).pop();
      for (const [section, link] of links) {
        if (section === current) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    },
    { rootMargin: "-80px 0px -70% 0px" },
  );
  for (const section of links.keys()) if (section) observer.observe(section);
}

// --- copying code ------------------------------------------------------------------------------
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch (error) {
    return false;
  }
}

for (const block of all(".cell_input .highlight, .bd-article > section .highlight")) {
  if (block.closest(".cell_output") || block.querySelector(".copybtn")) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copybtn";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    // A doctest is copied without its prompts and without what it prints.
    const lines = block.querySelector("pre").textContent.split("\n");
    const session = lines.some((line) => line.startsWith(">>> "));
    const code = session
      ? lines.filter((line) => /^(>>>|\.\.\.)/.test(line)).map((line) => line.slice(4))
      : lines;
    const done = await copy(code.join("\n").trimEnd());
    button.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  block.append(button);
}

// --- what is wider than the page scrolls inside itself, also from the keyboard -------------------
const WIDE =
  "pre, .math-scroll, .pst-scrollable-table-container, .output.text_html, dt.sig, .cell_output:has(> img)";
// The style sheet shades the side at which it goes on.
function showMore(element) {
  const left = element.scrollLeft > 1;
  const right = element.scrollLeft + element.clientWidth < element.scrollWidth - 1;
  element.dataset.more = [left && "left", right && "right"].filter(Boolean).join(" ");
}

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth + 1) {
      target.tabIndex = 0;
      target.onscroll = () => showMore(target);
    } else target.removeAttribute("tabindex");
    showMore(target);
  }
});
for (const element of all(WIDE)) resized.observe(element);

// A figure of several panels stays as large as one of a single panel is on a phone, and scrolls.
for (const figure of all(".cell_output > img")) {
  const keep = () => (figure.style.minWidth = `${Math.round(0.35 * figure.naturalWidth)}px`);
  if (figure.complete) keep();
  else figure.addEventListener("load", keep);
}

// --- printing: light, and nothing folded ---------------------------------------------------------
let folded = [];
addEventListener("beforeprint", () => {
  root.dataset.theme = "light";
  folded = all("article details:not([open])");
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => {
  applyMode(root.dataset.mode);
  for (const details of folded) details.open = false;
});
