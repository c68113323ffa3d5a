// Runs the code cells of a page where they stand: loaded only when `make live` serves the book.
"use strict";

(function () {
  const { token, folder } = document.currentScript.dataset;
  const headers = { Authorization: `token ${token}`, "Content-Type": "application/json" };
  const session = crypto.randomUUID();
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const button = (text, act) => {
    const made = make("button", { type: "button", textContent: text });
    made.addEventListener("click", act);
    return made;
  };

  // --- the kernel -------------------------------------------------------------------------------
  let kernel = null; // a promise of { id, socket }
  let running = null; // what it gave
  const waiting = new Map(); // from the id of a request to what handles its messages
  const outputs = new Map(); // from the id of an output widget to what it shows

  const request = (path, method, body) =>
    fetch(`/api/kernels${path}`, { method, headers, body: body && JSON.stringify(body), keepalive: method === "DELETE" });

  async function start() {
    const answer = await request("", "POST", { name: "python3", path: folder });
    if (!answer.ok) throw new Error(`the kernel did not start (${answer.status})`);
    const { id } = await answer.json();
    const protocol = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${protocol}://${location.host}/api/kernels/${id}/channels?token=${token}`);
    await new Promise((opened, failed) => {
      socket.onopen = opened;
      socket.onerror = () => failed(new Error("no connection to the kernel"));
    });
    socket.onmessage = ({ data }) => receive(JSON.parse(data));
    socket.onclose = () => {
      for (const handle of waiting.values()) handle({ header: { msg_type: "lost" }, content: {} });
      waiting.clear();
    };
    running = { id, socket };
    return running;
  }

  function receive(message) {
    const { content, header, parent_header: parent } = message;
    const { comm_id: id, data = {} } = content;
    const state = data.state || {};
    if (header.msg_type === "comm_open" && state._model_name === "OutputModel") {
      outputs.set(id, { list: state.outputs || [], views: new Set() });
    } else if (header.msg_type === "comm_msg" && outputs.has(id) && state.outputs) {
      const output = outputs.get(id);
      output.list = state.outputs;
      output.views.forEach((view) => fill(view, output.list));
    }
    waiting.get(parent.msg_id)?.(message);
  }

  async function execute(code, handle) {
    kernel ||= start();
    const { socket } = await kernel.catch((error) => {
      kernel = null;
      throw error;
    });
    const id = crypto.randomUUID();
    const content = { code, silent: false, store_history: true, user_expressions: {}, allow_stdin: false, stop_on_error: true };
    return new Promise((done, lost) => {
      waiting.set(id, (message) => {
        const idle = message.header.msg_type === "status" && message.content.execution_state === "idle";
        if (message.header.msg_type === "lost") lost(new Error("the kernel is gone; run the cells again"));
        else if (!idle) handle(message.header.msg_type, message.content);
        else if (waiting.delete(id)) done();
      });
      const header = { msg_id: id, msg_type: "execute_request", session, username: "", version: "5.3" };
      socket.send(JSON.stringify({ channel: "shell", header, parent_header: {}, metadata: {}, content }));
    });
  }

  // Without waiting for anything first: a page that is left runs nothing later.
  function stop() {
    if (!running) return;
    running.socket.close();
    request(`/${running.id}`, "DELETE");
    kernel = running = null;
  }
  addEventListener("pagehide", stop);

  // --- what a cell shows ------------------------------------------------------------------------
  const colors = /\u001b\[[0-9;]*m/g;

  function block(text, kind) {
    const pre = make("pre", {}, text);
    return make("div", { className: `output ${kind} highlight` }, pre);
  }

  function html(text) {
    const box = make("div", { className: "output text_html", innerHTML: text });
    for (const script of box.querySelectorAll("script")) {
      const runs = make("script", { textContent: script.textContent });
      for (const { name, value } of script.attributes) runs.setAttribute(name, value);
      script.replaceWith(runs); // one that comes by innerHTML does not run
    }
    return box;
  }

  function shown(data, metadata = {}) {
    const widget = outputs.get(data["application/vnd.jupyter.widget-view+json"]?.model_id);
    if (widget) {
      const view = make("div", { className: "output" });
      widget.views.add(view);
      fill(view, widget.list);
      return view;
    }
    const picture = ["image/png", "image/jpeg"].find((type) => type in data);
    if (data["text/html"]) return html([data["text/html"]].flat().join(""));
    if (data["image/svg+xml"]) return html([data["image/svg+xml"]].flat().join(""));
    if (picture) {
      const alt = metadata.alt || data["text/plain"] || "figure";
      return make("div", { className: "output image_png" }, make("img", { alt, src: `data:${picture};base64,${data[picture]}` }));
    }
    return block([data["text/plain"] || ""].flat().join(""), "text_plain");
  }

  function fill(view, list) {
    view.replaceChildren(...list.map(({ data, metadata, text }) => (data ? shown(data, metadata) : block(text || "", "stream"))));
  }

  // The text of a copy of a cell: editing makes line breaks in two ways.
  function written(copy) {
    for (const line of copy.querySelectorAll("br")) line.replaceWith("\n");
    return copy.textContent;
  }

  class Cell {
    constructor(element, number) {
      this.source = element.querySelector(".cell_input pre");
      this.original = this.source.cloneNode(true);
      this.output = element.querySelector(".cell_output");
      if (!this.output) {
        this.output = make("div", { className: "cell_output docutils container" });
        element.append(this.output);
      }
      this.before = [...this.output.childNodes];
      this.alt = element.querySelector(".cell_output img")?.alt;
      Object.assign(this.source, { contentEditable: "plaintext-only", spellcheck: false });
      this.source.setAttribute("role", "textbox");
      this.source.setAttribute("aria-multiline", "true");
      this.source.setAttribute("aria-label", `Code of cell ${number + 1}. Control Enter runs it.`);
      this.source.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
          event.preventDefault();
          runAll([this]);
        } else if (event.key === "Enter" && !event.shiftKey) {
          event.preventDefault();
          this.newLine();
        }
      });
      this.state = make("span", { className: "live-state" });
      this.run = button("Run", () => runAll([this]));
      const above = button("Run all above", () => runAll(cells.slice(0, number)));
      if (number === 0) above.disabled = true;
      const bar = make("div", { className: "live-bar" }, this.run, above, button("Reset", () => this.reset()), this.state);
      const fold = this.source.closest("details");
      // Code that is folded alone can be run without being unfolded.
      if (fold && !fold.contains(this.output)) fold.after(bar);
      else this.source.closest(".cell_input").append(bar);
      this.element = element;
    }

    // Begin the next line below the beginning of this one.
    newLine() {
      const { focusNode, focusOffset } = getSelection();
      const range = document.createRange();
      range.selectNodeContents(this.source);
      range.setEnd(focusNode, focusOffset);
      const line = written(range.cloneContents()).split("\n").pop();
      document.execCommand("insertText", false, `\n${line.match(/^ */)[0]}${line.trimEnd().endsWith(":") ? "    " : ""}`);
    }

    reset() {
      this.source.replaceChildren(...this.original.cloneNode(true).childNodes);
      this.output.replaceChildren(...this.before);
      this.state.textContent = "";
      this.element.classList.remove("live-failed", "live-done");
    }

    // Whether it ran to its end.
    async execute() {
      let failed = false;
      let renewed = false; // by clear_output(wait=True): with the next output
      const byId = new Map();
      const add = (element) => {
        if (renewed) this.output.replaceChildren();
        renewed = false;
        this.output.append(element);
        return element;
      };
      const handle = (type, content) => {
        const id = content.transient?.display_id;
        if (type === "stream") {
          const last = this.output.lastElementChild;
          const pre = !renewed && last?.classList.contains(content.name) ? last.querySelector("pre") : add(block("", `stream ${content.name}`)).querySelector("pre");
          // A carriage return begins the line anew, as progress bars do.
          pre.textContent = (pre.textContent + content.text.replace(colors, "")).replace(/\r\n/g, "\n").replace(/^.*\r/gm, "");
        } else if (type === "execute_result" || type === "display_data") {
          const metadata = { alt: this.alt, ...(content.metadata["image/png"] || {}) };
          const element = add(shown(content.data, metadata));
          if (id) byId.set(id, element);
        } else if (type === "update_display_data" && byId.has(id)) {
          const element = shown(content.data, content.metadata);
          byId.get(id).replaceWith(element);
          byId.set(id, element);
        } else if (type === "clear_output") {
          if (content.wait) renewed = true;
          else this.output.replaceChildren();
        } else if (type === "error") {
          failed = true;
          add(block(content.traceback.join("\n").replace(colors, ""), "stderr live-error"));
        }
      };
      this.element.classList.remove("live-failed", "live-done");
      this.state.textContent = "running";
      this.run.disabled = true;
      this.output.replaceChildren();
      try {
        await execute(written(this.source.cloneNode(true)), handle);
      } catch (error) {
        failed = true;
        this.output.append(block(`${error.message}`, "stderr live-error"));
      }
      for (const wide of all(WIDE, this.output)) resized.observe(wide); // it scrolls: see book.js
      this.run.disabled = false;
      this.state.textContent = failed ? "failed" : "done";
      this.element.classList.add(failed ? "live-failed" : "live-done");
      return !failed;
    }
  }

  // --- the page ---------------------------------------------------------------------------------
  const status = make("span", { className: "live-status", role: "status", textContent: "Python starts with the first cell." });
  let queue = Promise.resolve();

  // One after the other, until one fails. The answer to a question unfolds for who runs its cell.
  function runAll(some) {
    if (some.length === 1) all("details.below-input", some[0].element).forEach((fold) => (fold.open = true));
    queue = queue.then(async () => {
      for (const [index, cell] of some.entries()) {
        status.textContent = `Running cell ${index + 1} of ${some.length}.`;
        if (!(await cell.execute())) {
          status.textContent = `Cell ${cells.indexOf(cell) + 1} failed.`;
          return;
        }
      }
      status.textContent = some.length === 1 ? `Cell ${cells.indexOf(some[0]) + 1} is done.` : `${some.length} cells are done.`;
    });
    return queue;
  }

  const cells = [...document.querySelectorAll("article .cell")]
    .filter((element) => element.querySelector(".cell_input pre"))
    .map((element, number) => new Cell(element, number));
  if (cells.length === 0) return;
  const page = make(
    "div",
    { className: "live-page" },
    make("p", {}, "This page is live: edit any cell and run it with Ctrl-Enter."),
    button("Run all", () => runAll(cells)),
    button("Interrupt", () => running && request(`/${running.id}/interrupt`, "POST")),
    button("Restart", () => {
      stop();
      cells.forEach((cell) => cell.reset());
      status.textContent = "Python starts with the first cell.";
    }),
    status,
  );
  document.querySelector("article h1").after(page);
})();
