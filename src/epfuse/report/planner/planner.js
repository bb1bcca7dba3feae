// The planner: shows what `epfuse plan --json` says, of one plan or of many. No libraries, nothing from elsewhere.
"use strict";

(() => {
  const ROOM = { width: 640, height: 260, left: 76, right: 12, top: 12, bottom: 34 };
  const CHOICES = ["model", "device", "ranks", "tokens", "share"];

  /** An element; children are elements or text, never markup. */
  function make(tag, attributes = {}, ...children) {
    const svg = ["svg", "path", "circle", "line", "text", "g", "title"].includes(tag);
    const found = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) found.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) found.setAttribute(name, value);
    }
    found.append(...children.filter((child) => child !== null && child !== undefined));
    return found;
  }

  /** A number that tests and screen readers find by its key. */
  const figure = (key, text) => make("b", { "data-key": key }, text);
  const gigabytes = (bytes) => `${(bytes / 1e9).toFixed(1)} GB`;
  const microseconds = (us) => (us >= 1000 ? `${(us / 1000).toFixed(2)} ms` : `${us.toFixed(1)} µs`);
  const counted = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

  /** What a page of one plan carries, or what the site serves. */
  async function open(root) {
    const inside = document.getElementById("planner-data");
    if (inside) {
      const all = JSON.parse(inside.textContent);
      return { ...all.index, records: async (model, device) => all.records[`${model}/${device}`] };
    }
    const base = root.dataset.from;
    const read = async (name) => {
      const answer = await fetch(base + name);
      if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
      return answer.json();
    };
    const cache = {};
    const records = (model, device) => (cache[`${model}/${device}`] ??= read(`${model}/${device}.json`));
    return { ...(await read("index.json")), records };
  }

  /** What is asked for in the address, where it is something that there is; else the defaults. */
  function asked(all) {
    const words = new URLSearchParams(location.hash.slice(1));
    const one = (name, values, otherwise) => (values.map(String).includes(words.get(name)) ? words.get(name) : otherwise);
    const share = Number(words.get("share") ?? 40);
    return {
      model: one("model", all.models.map((each) => each.name), all.models[0].name),
      device: one("device", all.devices.map((each) => each.name), all.devices[0].name),
      ranks: Number(one("ranks", all.ranks, all.ranks.includes(8) ? 8 : all.ranks[0])),
      tokens: Number(one("tokens", all.tokens, all.tokens.includes(256) ? 256 : all.tokens[0])),
      share: share >= 0 && share <= 100 ? share : 40,
    };
  }

  function controls(all, state, changed) {
    const pick = (name, label, options) => {
      const select = make("select", { name, "aria-label": label }, ...options.map(([value, text]) =>
        make("option", { value, selected: String(value) === String(state[name]) }, text)));
      select.addEventListener("change", () => changed(name, select.value));
      return make("label", {}, make("span", {}, label), select);
    };
    const models = all.models.map((each) => [each.name, `${each.name} (${each.checkpoint})`]);
    const devices = all.devices.map((each) => [each.name, `${each.title}, ${gigabytes(each.hbm_bytes)}`]);
    return make("form", { class: "planner-controls" },
      pick("model", "Model", models),
      pick("device", "GPU", devices),
      pick("ranks", "Ranks (GPUs)", all.ranks.map((each) => [each, String(each)])),
      pick("tokens", "Tokens of a call", all.tokens.map((each) => [each, String(each)])));
  }

  /** Does it fit, and how many bytes each way of storing takes. */
  function sizes(record) {
    const { bytes_per_rank: bytes, memory } = record;
    const formats = Object.entries(bytes).filter(([name]) => name !== "chosen");
    const kept = record.layers ? [...new Set(record.layers.map((each) => each.storage))] : [];
    const top = Math.max(memory.hbm_bytes, ...formats.map(([, size]) => size));
    const row = ([name, size]) => {
      const fits = memory.fits[name];
      const bar = make("span", { class: `planner-bar ${fits ? "good" : "bad"}`, style: `width:${(100 * size) / top}%` });
      const limit = make("span", { class: "planner-limit", style: `left:${(100 * memory.expert_budget) / top}%` });
      const chosen = kept.includes(name) ? " (this plan)" : "";
      return make("div", { class: "planner-size" },
        make("span", {}, name + chosen),
        make("span", { class: "planner-track" }, bar, limit),
        make("span", {}, figure(`bytes.${name}`, gigabytes(size)), " ",
          make("span", { "data-key": `fits.${name}`, class: fits ? "good" : "bad" }, fits ? "fits" : "does not fit")));
    };
    return make("section", {}, make("h3", {}, "Bytes of the experts, one rank"), ...formats.map(row),
      make("p", { class: "planner-soft" }, "The line is what experts may take: ",
        figure("budget", gigabytes(memory.expert_budget)), " of ", gigabytes(memory.hbm_bytes),
        "; attention, activations and the KV cache need the rest."));
  }

  /** Which path runs at this token count, why, and what was refused. */
  function decision(record, state) {
    const range = record.ranges.find((each) =>
      each.min_tokens <= state.tokens && (each.max_tokens === null || state.tokens <= each.max_tokens));
    const refused = make("ul", {}, ...record.refused.map((each) =>
      make("li", {}, make("code", {}, each.path), " ", each.reason)));
    const left = record.refused.length ? record.refused[0].reason : "";
    const said = range
      ? make("p", {}, make("code", { "data-key": "path" }, range.path), " ", range.reason)
      : make("p", {}, "epfuse leaves these layers alone. ", make("span", { "data-key": "left" }, left));
    const tile = range && range.tile
      ? make("p", { class: "planner-soft" }, "Tiles (block_m/gate_up/down): ", make("code", { "data-key": "tile" }, range.tile))
      : null;
    const others = range && record.refused.length
      ? make("details", {}, make("summary", {}, "What was not taken, and why"), refused) : null;
    return make("section", {}, make("h3", {}, `What runs at ${counted(state.tokens, "token")}`), said, tile, others);
  }

  const mark = (time) => make("span", { class: `planner-mark ${time.kind.replaceAll(" ", "-")}`, title: time.source }, time.kind);

  /** One layer's time beside vLLM's choice and the floor. */
  function times(record, state) {
    const now = record.times.find((each) => each.tokens === state.tokens);
    const name = record.vllm ? record.vllm.name : "not known";
    const cell = (key, title, time, nothing) => make("div", { class: `planner-time ${key}` },
      make("span", {}, title),
      time ? figure(`time.${key}`, microseconds(time.us)) : make("b", { "data-key": `time.${key}` }, "–"),
      time ? mark(time) : make("span", { class: "planner-soft" }, nothing));
    const ours = record.ranges.length ? "nothing is calibrated for this GPU" : "epfuse leaves the layer";
    const floor = now.floor_us === null ? null : { us: now.floor_us, kind: "at the least", source: "data sheet" };
    const theirs = record.vllm ? (record.vllm.evidence ?? "no figure of it") : "no figure of it";
    const sources = [now.epfuse, now.vllm].filter(Boolean).map((time) => time.source);
    return make("section", {}, make("h3", {}, "One layer, one rank"),
      make("div", { class: "planner-times" },
        cell("epfuse", "epfuse", now.epfuse, ours),
        cell("vllm", name.startsWith("vLLM") ? name : `vLLM: ${name}`, now.vllm, theirs),
        cell("floor", "floor", floor, "unknown")),
      chart(record, state),
      make("p", { class: "planner-soft" },
        "Measured: a call, on this card and layer. Predicted: both expert GEMMs, by the time model. Floor: the active",
        " experts' bytes at the data sheet's bandwidth, or the rows' FLOPs. ",
        [...new Set(sources)].join("; "), sources.length ? "." : "",
        record.vllm ? ` ${name}: ${record.vllm.effect} ${record.vllm.plugin}` : ""));
  }

  /** Time over tokens, both axes logarithmic; a filled mark is measured, a hollow one predicted. */
  function chart(record, state) {
    const series = ["epfuse", "vllm", "floor"].map((key) => [key, record.times
      .map((each) => ({ tokens: each.tokens, time: key === "floor" ? each.floor_us && { us: each.floor_us } : each[key] }))
      .filter((point) => point.time)]);
    const all = series.flatMap(([, points]) => points.map((point) => point.time.us));
    if (!all.length) return null;
    const low = Math.floor(Math.log10(Math.min(...all))), high = Math.ceil(Math.log10(Math.max(...all)) + 1e-9);
    const counts = record.times.map((each) => each.tokens);
    const { width, height, left, right, top, bottom } = ROOM;
    const last = Math.log2(counts[counts.length - 1]);
    const x = (tokens) => left + ((width - left - right) * Math.log2(tokens)) / last;
    const y = (us) => top + ((height - top - bottom) * (high - Math.log10(us))) / (high - low);
    const shown = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "planner-chart",
      "aria-label": "Microseconds of one layer over the tokens of a call" });
    for (let power = low; power <= high; power += 1) {
      shown.append(make("line", { x1: left, x2: width - right, y1: y(10 ** power), y2: y(10 ** power) }),
        make("text", { x: left - 6, y: y(10 ** power) + 4, "text-anchor": "end" }, microseconds(10 ** power).replace(".0 ", " ").replace(".00", "")));
    }
    for (const tokens of counts.filter((_, index) => index % 2 === 0)) {
      shown.append(make("text", { x: x(tokens), y: height - 14, "text-anchor": "middle" }, String(tokens)));
    }
    shown.append(make("line", { x1: x(state.tokens), x2: x(state.tokens), y1: top, y2: height - bottom, class: "now" }));
    for (const [key, points] of series) {
      const path = points.map((point, index) => `${index ? "L" : "M"}${x(point.tokens).toFixed(1)} ${y(point.time.us).toFixed(1)}`);
      shown.append(make("path", { d: path.join(""), class: key }));
      if (key === "floor") continue;
      for (const { tokens, time } of points) {
        shown.append(make("circle", { cx: x(tokens), cy: y(time.us), r: 3.5, class: `${key} ${time.kind}` },
          make("title", {}, `${key}, ${tokens} tokens: ${microseconds(time.us)}, ${time.kind}`)));
      }
    }
    const key = ["epfuse", "vllm", "floor"].map((name) => make("span", { class: `planner-key ${name}` }, name === "vllm" ? "vLLM" : name));
    return make("figure", {}, make("figcaption", {}, ...key, make("span", { class: "planner-soft" },
      "time over tokens of a call; filled: measured, hollow: predicted")), shown);
  }

  /** What a whole step gains if the experts take a share of it: Amdahl's law, shown. */
  function step(record, state, changed) {
    const now = record.times.find((each) => each.tokens === state.tokens);
    const slider = make("input", { type: "range", min: 0, max: 100, step: 5, value: state.share, name: "share",
      "aria-label": "Share of a step that experts take, percent" });
    slider.addEventListener("input", () => changed("share", slider.value));
    const ask = make("label", { class: "planner-share" }, make("span", {}, `Experts take ${state.share} % of a step with vLLM's choice`), slider);
    if (!now.epfuse || !now.vllm) {
      return make("section", {}, make("h3", {}, "What a step gains"),
        make("p", {}, "Not known: there is no time of both at this token count."));
    }
    const share = state.share / 100, ratio = now.epfuse.us / now.vllm.us;
    const gain = 1 / (1 - share + share * ratio);
    const most = 1 / (1 - share);
    return make("section", {}, make("h3", {}, "What a step gains"), ask,
      make("p", { class: "planner-formula" }, `1 / (1 − ${share.toFixed(2)} + ${share.toFixed(2)} × ${ratio.toFixed(2)}) = `,
        figure("gain", `${gain.toFixed(2)} ×`), " as fast"),
      make("p", { class: "planner-soft" }, `${ratio.toFixed(2)} is epfuse's time over vLLM's. However fast experts were, a step could`,
        Number.isFinite(most) ? ` not be more than ${most.toFixed(2)} × as fast.` : " be as fast as they are.",
        " ", make("code", {}, "epfuse profile"), " says what share they take in your server."));
  }

  function command(all, state) {
    const said = `epfuse plan --config ${state.model} --ep-size ${state.ranks} --device ${state.device} --max-model-len ${all.max_model_len} --json`;
    return make("p", { class: "planner-soft" }, "The same on the command line: ", make("code", {}, said));
  }

  async function show(root, all, state, changed) {
    const records = await all.records(state.model, state.device);
    const record = records[String(state.ranks)];
    const model = all.models.find((each) => each.name === state.model);
    const about = make("p", { class: "planner-soft" }, `${model.name}: H ${model.hidden}, I ${model.intermediate}, E ${model.experts}, K ${model.top_k}, ${counted(model.moe_layers, "layer")} with experts; from ${model.source}`);
    const parts = record.refusal
      ? [make("p", { class: "planner-refusal", "data-key": "refusal" }, record.refusal), record.memory ? sizes(record) : null]
      : [make("div", { class: "planner-columns" }, sizes(record), decision(record, state)), times(record, state), step(record, state, changed)];
    root.replaceChildren(controls(all, state, changed), about, ...parts.filter(Boolean), command(all, state));
    root.dataset.shown = CHOICES.map((name) => state[name]).join(" ");
  }

  async function start(root) {
    try {
      const all = await open(root);
      const state = asked(all);
      const changed = async (name, value) => {
        state[name] = ["model", "device"].includes(name) ? value : Number(value);
        history.replaceState(null, "", `#${new URLSearchParams(state)}`);
        await show(root, all, state, changed);
        root.querySelector(`[name=${name}]`)?.focus();
      };
      addEventListener("hashchange", () => {
        Object.assign(state, asked(all));
        show(root, all, state, changed);
      });
      await show(root, all, state, changed);
    } catch (error) {
      root.replaceChildren(make("p", { class: "planner-refusal" }, `The planner's data can't be read: ${error.message}`));
      throw error;
    }
  }

  addEventListener("DOMContentLoaded", () => document.querySelectorAll(".planner").forEach(start));
})();
