// Searches `searchIndex`: [[file, page title, [[anchor, section title, text], ...]], ...].
"use strict";

(function () {
  const LIMIT = 40;
  const query = new URLSearchParams(location.search).get("q") || "";
  const field = document.querySelector("article .bd-search input");
  field.value = query;

  const words = query.toLowerCase().match(/[\p{L}\p{N}_]+/gu) || [];
  const escape = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  // A word of the query matches at the start of a word, or after an underscore of a name.
  const starts = words.map((word) => new RegExp(`(?<![\\p{L}\\p{N}])${escape(word)}`, "giu"));
  const count = (text, pattern) => (text.match(pattern) || []).length;

  function score(pageTitle, title, text) {
    let total = 0;
    for (const pattern of starts) {
      const heading = count(title, pattern);
      const body = count(text, pattern);
      if (heading + body === 0) return 0;
      const density = body / Math.sqrt(text.length + 200);
      total += 4 * Math.min(heading, 1) + Math.min(count(pageTitle, pattern), 1) + density;
    }
    return title.toLowerCase() === query.toLowerCase().trim() ? total + 10 : total;
  }

  function mark(element, text) {
    const pattern = new RegExp(`(?<![\\p{L}\\p{N}])(?:${words.map(escape).join("|")})[\\p{L}\\p{N}]*`, "giu");
    let last = 0;
    for (const match of text.matchAll(pattern)) {
      element.append(text.slice(last, match.index));
      element.append(Object.assign(document.createElement("mark"), { textContent: match[0] }));
      last = match.index + match[0].length;
    }
    element.append(text.slice(last));
    return element;
  }

  function excerpt(text) {
    const at = Math.min(...starts.map((pattern) => text.search(pattern)).filter((i) => i >= 0));
    if (!Number.isFinite(at)) return text.slice(0, 180) + (text.length > 180 ? " …" : "");
    const begin = at < 60 ? 0 : text.indexOf(" ", at - 60) + 1;
    const end = Math.min(text.length, begin + 220);
    return (begin > 0 ? "… " : "") + text.slice(begin, end) + (end < text.length ? " …" : "");
  }

  const status = document.getElementById("search-status");
  if (words.length === 0) {
    status.textContent = "Type a word or a name, for example “retain_graph”.";
    field.focus();
    return;
  }
  const found = searchIndex
    .flatMap(([file, pageTitle, sections]) =>
      sections.map(([anchor, title, text], index) => ({
        // The first section is the page itself.
        link: index === 0 ? file : `${file}#${anchor}`,
        place: index === 0 ? "" : pageTitle,
        title,
        text,
        score: score(pageTitle, title, text),
      })),
    )
    .filter((item) => item.score > 0)
    .sort((a, b) => b.score - a.score);

  const shown = found.slice(0, LIMIT);
  const more = found.length > shown.length ? `, the best ${shown.length} shown` : "";
  status.textContent =
    found.length === 0
      ? `Nothing found for “${query}”.`
      : `${found.length} ${found.length === 1 ? "place" : "places"} found for “${query}”${more}.`;
  document.title = `${query} · ${document.title}`;
  const list = document.createElement("ul");
  list.className = "search";
  for (const item of shown) {
    const entry = document.createElement("li");
    const link = mark(document.createElement("a"), item.title);
    link.href = item.link;
    entry.append(link);
    if (item.place) {
      const place = document.createElement("span");
      place.className = "search-place";
      place.textContent = item.place;
      entry.append(place);
    }
    if (item.text) entry.append(mark(document.createElement("p"), excerpt(item.text)));
    list.append(entry);
  }
  document.getElementById("search-results").append(list);
})();
