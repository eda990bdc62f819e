// The page of hamdist: a run while it goes on (`hamdist view`), or a report with its data baked in.
// Events are those of hamdist/runtime/results/events.py. Text from events is only ever set as text.
"use strict";
(() => {
  // -- small helpers ----------------------------------------------------------------------------
  const PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]; // Okabe, Ito
  const DASHES = [[], [8, 4], [2, 3], [8, 3, 2, 3], [14, 4]];
  const MOST_NODES = 150; // with more blocks the picture shows actors, with more of those hosts
  const MOST_STRIPS = 64;
  const MOST_POINTS = 2000; // of one block's norms, and of an actor's strip
  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function make(tag, attributes = {}, ...children) {
    const svg = ["svg", "g", "path", "rect", "text", "title"].includes(tag);
    const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== undefined && value !== false) node.setAttribute(name, value);
    }
    node.append(...children.filter((c) => c !== undefined && c !== null));
    return node;
  }

  function number(x, digits = 3) {
    if (x === null || x === undefined || !Number.isFinite(x)) return "–";
    if (Number.isInteger(x) && Math.abs(x) < 1e12) return x.toLocaleString("en");
    return Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3)
      ? x.toExponential(digits - 1) : Number(x.toPrecision(digits)).toLocaleString("en");
  }
  const percent = (x) => (Number.isFinite(x) ? `${(100 * x).toFixed(0)} %` : "–");
  function bytes(x) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let i = 0;
    while (x >= 1024 && i < units.length - 1) { x /= 1024; i += 1; }
    return `${number(x)} ${units[i]}`;
  }

  const baked = byId("data") ? JSON.parse(byId("data").textContent) : { events: [], figures: [] };

  // -- what is known of each run ------------------------------------------------------------------
  const runs = new Map();
  const folders = []; // of a live page: {path, from, alive, controls, key}
  let chosenRun = null;
  let chosenBlock = null;
  let changed = true;

  function runOf(folder, event) {
    const key = [folder, event.level ?? "", event.seed ?? ""].join("|");
    if (!runs.has(key)) {
      runs.set(key, {
        key, folder, level: event.level ?? "run", seed: event.seed, title: "", windows: new Map(),
        network: null, blocks: null, history: new Map(), actors: [], edges: [], progress: null,
        log: [], phase: null, finished: null, evaluation: null, aligned: new Map(),
      });
      chosenRun = chosenRun ?? key;
    }
    return runs.get(key);
  }

  const takers = {
    run(run, e) { Object.assign(run, { title: e.title, settings: e.settings, steps: e.steps });
      run.windows.clear(); run.actors = []; run.edges = []; run.finished = null; chosenRun = run.key; },
    phase(run, e) { run.phase = e.phase; },
    network(run, e) { run.network = e; run.actorOf = new Map(); run.blockOf = new Map();
      for (const a of e.actors) for (const b of a.blocks) run.actorOf.set(b, a.name);
      for (const b of e.blocks) run.blockOf.set(b.name, b); },
    window(run, e) {
      if (!run.windows.has(e.readout)) run.windows.set(e.readout, []);
      run.windows.get(e.readout).push(e);
    },
    progress(run, e) { run.progress = e; },
    blocks(run, e) {
      run.blocks = e;
      for (const [name, norms] of Object.entries(e.norms)) {
        if (!run.history.has(name)) run.history.set(name, []);
        const points = run.history.get(name);
        points.push([run.progress ? run.progress.samples : 0, norms.h, norms.z, norms.omega, norms.theta, norms.update]);
        thin(points);
      }
    },
    alignment(run, e) {
      for (const [name, cosine] of Object.entries(e.cosines)) {
        if (!run.aligned.has(name)) run.aligned.set(name, []);
        run.aligned.get(name).push([e.sample, cosine]);
        thin(run.aligned.get(name));
      }
    },
    actors(run, e) { run.actors.push(e); thin(run.actors); },
    edges(run, e) { run.edges.push(e); if (run.edges.length > 12) run.edges.shift(); },
    evaluation(run, e) { run.evaluation = e; },
    finished(run, e) { run.finished = e; },
  };
  function thin(points) { // every second one of the older half goes
    if (points.length <= MOST_POINTS) return;
    const half = points.length >> 1;
    points.splice(0, half, ...points.slice(0, half).filter((_, i) => i % 2));
  }
  const LOGGED = {
    phase: (e) => `start: ${e.phase}`, snapshot: (e) => `snapshot: ${e.path}`,
    warning: (e) => `warning: ${e.text}`, settings: (e) => `settings: ${JSON.stringify(e.changed)}`,
    replaced: (e) => `${e.actor} (${e.blocks.join(", ")}) was ${e.lost ? "lost" : "set back"} at tick ` +
      `${e.tick ?? "?"}, back from tick ${e.since} in ${number(e.seconds)} s`,
    evaluation: (e) => `held out: loss ${number(e.loss)}` +
      (e.accuracy === null ? "" : `, accuracy ${(100 * e.accuracy).toFixed(2)} %`),
    finished: (e) => (e.failure ? `failed: ${e.failure}` : e.interrupted ? "interrupted" : e.stopped ? "stopped" : "finished"),
    ended: (e) => (e.error ? `ended: ${e.error}` : "the folder is released"),
  };

  function take(folder, event) {
    changed = true;
    if (event.event === "started" && folders[folder]) folders[folder].controls = event.controls;
    const own = event.level !== undefined ? runOf(folder, event) : runs.get(chosenRun);
    if (own === undefined) return;
    if (takers[event.event]) takers[event.event](own, event);
    if (LOGGED[event.event]) own.log.push({ time: event.time, kind: event.event, text: LOGGED[event.event](event), event });
    if (own.log.length > 500) own.log.shift();
  }

  // -- curves -----------------------------------------------------------------------------------
  let curves = null;
  const setting = (name) => { const box = byId(name); return box && (box.type === "checkbox" ? box.checked : box.value); };

  function series() {
    const found = [];
    const groups = new Map(); // a colour and dash for each level, so that seeds look alike
    for (const run of runs.values()) {
      const several = run.windows.size > 1;
      for (const [readout, windows] of run.windows) {
        const group = `${run.folder}|${run.level}|${several ? readout : ""}`;
        if (!groups.has(group)) groups.set(group, groups.size);
        const parts = [run.level, several ? readout : null, run.seed === undefined ? null : `seed ${run.seed}`];
        if (folders.length > 1) parts.unshift(folders[run.folder].path.split("/").pop());
        found.push({ label: parts.filter(Boolean).join(", "), windows, style: groups.get(group), level: run.level });
      }
    }
    return found;
  }

  function points(windows) {
    const loss = setting("metric") === "loss";
    const seconds = setting("against") === "seconds";
    const several = Math.max(1, Number(setting("average")) || 1);
    const x = [], y = [];
    for (let i = 0; i < windows.length; i += several) {
      const part = windows.slice(i, i + several);
      const samples = part.reduce((sum, w) => sum + w.samples, 0);
      const rows = part.reduce((sum, w) => sum + w.rows, 0);
      const sum = part.filter((w) => w.rows);
      const value = loss ? part.reduce((sum, w) => sum + w.loss * w.samples, 0) / samples
        : rows ? (100 * sum.reduce((all, w) => all + w.accuracy * w.rows, 0)) / rows : null;
      const last = part[part.length - 1];
      const at = seconds ? last.seconds : last.last + 1;
      if ((setting("log-x") && at <= 0) || (x.length && at <= x[x.length - 1])) continue;
      x.push(at);
      y.push(value === null || !Number.isFinite(value) || (setting("log-y") && value <= 0) ? null : value);
    }
    return [x, y];
  }

  function bars(u, spreads) { // of the points of figures
    u.ctx.save();
    spreads.forEach((spread, i) => spread.forEach((half, k) => {
      const y = u.data[i + 1][k];
      if (!half || y === null || y === undefined || !u.series[i + 1].show) return;
      const at = u.valToPos(u.data[0][k], "x", true);
      u.ctx.strokeStyle = u.series[i + 1].stroke();
      u.ctx.lineWidth = 1.5;
      u.ctx.beginPath();
      u.ctx.moveTo(at, u.valToPos(y - half, "y", true));
      u.ctx.lineTo(at, u.valToPos(y + half, "y", true));
      u.ctx.stroke();
    }));
    u.ctx.restore();
  }

  function renderFigures() {
    const box = byId("figures");
    if (!box) return;
    box.replaceChildren();
    for (const figure of baked.figures) {
      const target = make("div", { class: "plot figure" });
      const button = make("button", {}, "Save as SVG");
      box.append(make("h3", {}, figure.title), make("div", { class: "bar" }, button), target);
      const tables = figure.curves.map((c) => [c.x, c.y.map((v) => (figure.log_y && v <= 0 ? null : v))]);
      const data = uPlot.join(tables);
      const spreads = figure.curves.map((c) => data[0].map((x) => c.spread[c.x.indexOf(x)]));
      const reach = figure.curves.flatMap((c) => c.y.flatMap((v, i) => (v === null ? [] : [v - (c.spread[i] ?? 0), v + (c.spread[i] ?? 0)])));
      const lines = figure.curves.map((c) => ({ label: c.label, spanGaps: true, width: c.style ? 2 : 5, value: (_, v) => number(v, 4),
        stroke: c.style ? PALETTE[c.style[0] % PALETTE.length] : css("--other"), dash: c.style ? DASHES[c.style[1] % DASHES.length] : [],
        points: { show: c.points, size: 8 } }));
      const u = plot(target, data, lines, { logX: figure.log_x, logY: figure.log_y, xLabel: figure.x_label, yLabel: figure.y_label,
        ticks: figure.ticks, reach: figure.log_y || !spreads.some((s) => s.some(Boolean)) ? null : reach, draw: (plotted) => bars(plotted, spreads) });
      button.addEventListener("click", () => saveSvg(u, figure.title));
    }
  }

  function plot(target, data, lines, options = {}) {
    const width = Math.max(220, target.clientWidth);
    const axis = { stroke: css("--ink"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") } };
    const log = (on) => (on ? { distr: 3 } : {});
    target.replaceChildren();
    const named = options.ticks && options.ticks.length ? options.ticks : null;
    const places = named ? { range: [-0.5, named.length - 0.5] } : {};
    const marks = named ? { incrs: [1], values: (_, at) => at.map((v) => named[v] ?? "") } : {};
    const low = options.reach && Math.min(0, ...options.reach), high = options.reach && Math.max(...options.reach);
    const room = options.reach ? { range: [Math.min(...options.reach) >= 0 && Math.min(...options.reach) > high / 2 ? Math.min(...options.reach) * 0.98 : low * 1.1, high > 0 ? high * 1.05 : 0.05 * Math.abs(low)] } : {};
    return new uPlot({
      width, height: options.height ?? Math.min(420, Math.max(220, width * 0.45)),
      scales: { x: { time: false, ...log(options.logX), ...places }, y: { ...log(options.logY), ...room } },
      hooks: options.draw ? { draw: [options.draw] } : {},
      axes: [{ ...axis, label: options.xLabel, labelSize: 22, ...marks }, { ...axis, label: options.yLabel, labelSize: 22, size: 60 }],
      series: [{ label: options.xLabel, value: (_, v) => number(v, 6) }, ...lines],
      cursor: { drag: { x: true, y: false } },
    }, data, target);
  }

  function renderCurves() {
    const box = byId("curves");
    if (!box) return;
    const found = series().filter((s) => s.windows.length);
    byId("no-curves").hidden = found.length > 0;
    if (!found.length) return;
    if (!found.some((s) => s.windows.some((w) => w.rows)) && setting("metric") === "accuracy") byId("metric").value = "loss";
    const data = uPlot.join(found.map((s) => points(s.windows)));
    const lines = found.map((s) => {
      const baseline = s.level === "centralised";
      return { label: s.label, spanGaps: true, width: baseline ? 5 : 2, value: (_, v) => number(v, 4),
        stroke: baseline ? css("--other") : PALETTE[s.style % PALETTE.length],
        dash: baseline ? [] : DASHES[s.style % DASHES.length], points: { show: s.windows.length < 3 } };
    });
    const hidden = curves && curves.series.length === lines.length + 1 ? curves.series.map((s) => s.show) : null;
    if (curves) curves.destroy();
    curves = plot(box, data, lines, { logX: setting("log-x"), logY: setting("log-y"),
      xLabel: setting("against"),
      yLabel: setting("metric") === "loss" ? "prequential loss" : "prequential accuracy, %" });
    if (hidden) hidden.forEach((show, i) => { if (i && !show) curves.setSeries(i, { show: false }); });
    box.setAttribute("aria-label", `Curves of ${found.map((s) => s.label).join("; ")}`);
  }

  function saveSvg(u, name) { // the curves as they are shown now
    if (!u) return undefined;
    const [W, H, left, top, right, bottom] = [900, 560, 80, 20, 20, 110];
    const scale = (name, from, to) => { const s = u.scales[name], f = s.distr === 3 ? Math.log10 : (v) => v;
      return (v) => from + ((f(v) - f(s.min)) / (f(s.max) - f(s.min))) * (to - from); };
    const x = scale("x", left, W - right), y = scale("y", H - bottom, top);
    const svg = make("svg", { xmlns: SVG, viewBox: `0 0 ${W} ${H}`, width: W, height: H, "font-family": "sans-serif", "font-size": 12 },
      make("rect", { width: W, height: H, fill: "#fff" }));
    const text = (at, down, anchor, words) => svg.append(make("text", { x: at, y: down, "text-anchor": anchor }, words));
    u.axes.forEach((axis, i) => (axis._splits ?? []).forEach((v, k) => {
      const label = axis._values[k];
      if (label === null || label === "") return;
      const at = i ? y(v) : x(v);
      svg.append(make("path", { d: i ? `M${left},${at}H${W - right}` : `M${at},${top}V${H - bottom}`, stroke: "#ddd", fill: "none" }));
      if (i) text(left - 6, at + 4, "end", String(label)); else text(at, H - bottom + 16, "middle", String(label));
    }));
    text((left + W - right) / 2, H - bottom + 36, "middle", u.axes[0].label);
    text(left, top - 6, "start", u.axes[1].label);
    u.series.slice(1).filter((s) => s.show).forEach((s, i) => {
      const values = u.data[u.series.indexOf(s)];
      const points = values.map((v, k) => [u.data[0][k], v]).filter(([at, v]) => v !== null && v !== undefined && at >= u.scales.x.min && at <= u.scales.x.max);
      const style = { stroke: s.stroke(), "stroke-width": s.width, "stroke-dasharray": (s.dash ?? []).join(" "), fill: "none" };
      svg.append(make("path", { d: `M${points.map(([at, v]) => `${x(at).toFixed(1)},${y(v).toFixed(1)}`).join("L")}`, ...style }));
      const at = left + (i % 3) * 270, down = H - bottom + 58 + Math.floor(i / 3) * 18;
      svg.append(make("path", { d: `M${at},${down - 4}h32`, ...style }));
      text(at + 38, down, "start", s.label);
    });
    const link = make("a", { href: URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" })), download: `${name.replace(/[^\w-]+/g, "-")}.svg` });
    link.click();
    return svg;
  }

  // -- the network ------------------------------------------------------------------------------
  function spent(run) { // by actor: the share of each activity in the latest stretch of time
    const last = run.actors[run.actors.length - 1];
    const before = run.actors[Math.max(0, run.actors.length - 10)];
    const shares = new Map();
    if (last) for (const [actor, seconds] of Object.entries(last.seconds)) {
      const old = before === last ? {} : before.seconds[actor] ?? {};
      const total = seconds.total - (old.total ?? 0);
      const part = {};
      for (const [name, value] of Object.entries(seconds)) part[name] = total > 0 ? (value - (old[name] ?? 0)) / total : 0;
      shares.set(actor, part);
    }
    return shares;
  }
  function edgeRates(run) { // by edge: bytes a second, share of time waited, signals under way
    const last = run.edges[run.edges.length - 1], before = run.edges[0];
    const rates = new Map();
    if (!last) return rates;
    const time = Math.max(1e-9, last.time - before.time);
    for (const [name, now] of Object.entries(last.edges)) {
      const old = before === last ? null : before.edges[name];
      rates.set(name, { rate: old ? (now.bytes - old.bytes) / time : NaN, bytes: now.bytes, queued: now.queued,
        share: old ? Math.min(1, Math.max(0, (now.waited - old.waited) / time)) : 0, waited: now.waited });
    }
    return rates;
  }
  function blockLoads(run) { // by block: its part of the steps of all blocks
    const seconds = run.blocks ? run.blocks.seconds ?? {} : {};
    const sum = Object.values(seconds).reduce((a, b) => a + b, 0);
    return new Map(Object.entries(seconds).map(([name, s]) => [name, sum > 0 ? s / sum : 0]));
  }

  function slowest(run) { // the block that computes longest, where that is plain
    const loads = [...blockLoads(run)].filter(([name]) => run.blockOf?.has(name)).sort((a, b) => b[1] - a[1]);
    return loads.length > 1 && loads[0][1] > 2 / loads.length && loads[0][1] > 1.5 * loads[1][1] ? loads[0][0] : null;
  }

  function grouped(run) { // nodes and edges to draw: blocks, or actors, or hosts
    const net = run.network;
    const hostOf = new Map(net.actors.map((a) => [a.name, a.host || "host"]));
    let nameOf = (b) => b;
    let kind = "blocks";
    if (net.blocks.length > MOST_NODES) {
      kind = net.actors.length > MOST_NODES || net.actors.length < 2 ? "depths" : "actors";
      if (kind === "actors") nameOf = (b) => run.actorOf.get(b);
      else if (hostOf.size > 1) { kind = "hosts"; nameOf = (b) => hostOf.get(run.actorOf.get(b)); }
      else { const most = Math.max(...net.blocks.map((b) => b.depth)); const wide = Math.ceil((most + 1) / 40);
        nameOf = (b) => { const from = Math.floor(run.blockOf.get(b).depth / wide) * wide; return `depth ${from}–${from + wide - 1}`; }; }
    }
    const nodes = new Map();
    for (const b of net.blocks) {
      const name = nameOf(b.name);
      const node = nodes.get(name) ?? { name, depth: b.depth, blocks: [], parameters: 0 };
      node.blocks.push(b.name); node.parameters += b.parameters; node.depth = Math.min(node.depth, b.depth);
      nodes.set(name, node);
    }
    const edges = new Map();
    for (const e of net.edges) {
      const from = run.blockOf.has(e.parent) ? nameOf(e.parent) : e.parent, to = nameOf(e.child);
      if (from === to && kind !== "blocks") continue;
      if (!nodes.has(from)) nodes.set(from, { name: from, depth: -1, blocks: [], parameters: 0, input: true });
      const key = `${from} → ${to}`;
      const edge = edges.get(key) ?? { name: key, from, to, parts: [] };
      edge.parts.push(e.name); edges.set(key, edge);
    }
    return { kind, nodes: [...nodes.values()], edges: [...edges.values()] };
  }

  function renderNetwork(run) {
    const box = byId("network");
    if (!box || !run.network) return;
    const { kind, nodes, edges } = grouped(run);
    const rates = edgeRates(run), loads = blockLoads(run), slow = slowest(run);
    const columns = [...new Set(nodes.map((n) => n.depth))].sort((a, b) => a - b);
    const rows = columns.map((d) => nodes.filter((n) => n.depth === d));
    const W = 132, H = 40, DX = 200, DY = 60;
    const height = Math.max(...rows.map((r) => r.length)) * DY + 20;
    const place = new Map();
    rows.forEach((column, i) => column.forEach((node, j) => place.set(node.name,
      [10 + i * DX, height / 2 + (j - (column.length - 1) / 2) * DY - H / 2])));
    const width = columns.length * DX - DX + W + 20;
    const fit = Math.max(0.65 * width, Math.min(width, 2400, box.clientWidth - 4)); // all of it, where it stays readable
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width: fit, height: (height * fit) / width, role: "group", "aria-label": "network of blocks" });
    for (const edge of edges) {
      const [x1, y1] = place.get(edge.from), [x2, y2] = place.get(edge.to);
      const sum = edge.parts.map((p) => rates.get(p)).filter(Boolean).reduce((a, r) => ({
        rate: a.rate + (r.rate || 0), share: Math.max(a.share, r.share), queued: a.queued + r.queued }), { rate: 0, share: 0, queued: 0 });
      const ax = x1 + W, ay = y1 + H / 2, bx = x2, by = y2 + H / 2;
      const back = bx < ax; // an edge that leads back goes below
      const d = back ? `M${ax},${ay} C${ax + 60},${ay + 70} ${bx - 60},${by + 70} ${bx},${by}`
        : `M${ax},${ay} C${(ax + bx) / 2},${ay} ${(ax + bx) / 2},${by} ${bx},${by}`;
      const wide = 1.5 + Math.min(8, Math.log10(1 + sum.rate / 100) * 1.4);
      const level = Math.min(4, Math.floor(sum.share * 5));
      svg.append(make("path", { class: "edge", d, stroke: `var(--w${level})`, "stroke-width": wide.toFixed(1) },
        make("title", {}, `${edge.name}: ${bytes(sum.rate)}/s, ${sum.queued} signals under way, waited for ${percent(sum.share)} of the time`)));
      if (run.progress && !run.finished) svg.append(make("path", { class: "flow", d }));
    }
    for (const node of nodes) {
      const [x, y] = place.get(node.name);
      const load = node.blocks.reduce((s, b) => s + (loads.get(b) ?? 0), 0);
      const waiting = run.blocks ? node.blocks.find((b) => run.blocks.waiting[b]) : undefined;
      const isSlow = node.blocks.includes(slow);
      const says = node.input ? "input" : loads.size ? isSlow ? `slowest: ${percent(load)}` : `${percent(load)} of all steps` : `${number(node.parameters)} parameters`;
      const label = `${node.name}: ${says}${waiting ? `, waits for ${run.blocks.waiting[waiting]}` : ""}`;
      const open = () => { if (!node.input) { chosenBlock = node.blocks.length === 1 ? node.blocks[0] : node; changed = true; draw(); } };
      const chosen = chosenBlock && (chosenBlock === node.name || chosenBlock.name === node.name);
      const g = make("g", { class: `node${isSlow ? " slow" : ""}${chosen ? " chosen" : ""}`, tabindex: node.input ? undefined : 0,
        role: node.input ? undefined : "button", "aria-label": label, "data-name": node.name, onclick: open,
        onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); open(); } } });
      g.append(make("title", {}, label), make("rect", { x, y, width: W, height: H, rx: 6 }));
      if (load) g.append(make("rect", { class: "load", x: x + 4, y: y + H - 8, width: Math.max(1, (W - 8) * load), height: 4 }));
      const short = node.name.length > 19 ? `${node.name.slice(0, 18)}…` : node.name;
      g.append(make("text", { x: x + 8, y: y + 15 }, short), make("text", { x: x + 8, y: y + 29, "font-size": 10 }, says));
      svg.append(g);
    }
    const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.name : undefined;
    const first = !box.querySelector("svg .slow");
    box.replaceChildren(svg);
    if (slow && first) { // on a narrow page, too
      const [x] = place.get(nodes.find((n) => n.blocks.includes(slow)).name);
      box.scrollLeft = ((x + W / 2) * fit) / width - box.clientWidth / 2;
    }
    box.classList.toggle("running", Boolean(run.progress && !run.finished));
    if (focused) { const again = [...svg.querySelectorAll(".node")].find((n) => n.dataset.name === focused); if (again) again.focus(); }
    byId("network-says").textContent = kind === "blocks" ? `${nodes.filter((n) => !n.input).length} blocks`
      : `${run.network.blocks.length} blocks, shown by ${kind}`;
  }

  function staleness(counts) { // samples that came back after so many updates, as shares
    const all = Object.entries(counts ?? {});
    const sum = all.reduce((a, [, n]) => a + n, 0);
    const most = all.filter(([, n]) => n / sum >= 0.005).map(([late, n]) => `${late} updates: ${percent(n / sum)}`);
    return most.length ? most.join(", ") : "–";
  }
  function alignment(points) { // the cosine with backpropagation's gradient, and its mean
    if (!points) return "– (metrics.alignment)";
    return `${points.at(-1)[1].toFixed(3)} at sample ${points.at(-1)[0]}, mean ${number(points.reduce((a, p) => a + p[1], 0) / points.length)}`;
  }

  function renderBlock(run) {
    const box = byId("block");
    if (!box) return;
    if (!chosenBlock && slowest(run)) chosenBlock = slowest(run);
    if (!chosenBlock || !run.network) { box.replaceChildren(make("p", { class: "faint" }, "Choose a block in the picture.")); return; }
    if (typeof chosenBlock === "object") { // a group: its blocks to choose from
      const list = chosenBlock.blocks.slice(0, 200).map((b) => make("li", {}, make("button", { onclick: () => { chosenBlock = b; draw(); } }, b)));
      box.replaceChildren(make("h3", {}, chosenBlock.name), make("ul", { class: "log" }, ...list));
      return;
    }
    const block = run.blockOf.get(chosenBlock);
    if (!block) return;
    const now = run.blocks ?? { tick: {}, updates: {}, norms: {}, waiting: {} };
    const norms = now.norms[block.name] ?? {};
    const facts = { shape: `${block.shape.join(" × ")} (${block.dtype})`, parameters: number(block.parameters, 6),
      actor: run.actorOf.get(block.name) ?? "–", depth: `${block.depth} tick${block.depth === 1 ? "" : "s"}`, "messages late by": block.delay === null ? "–" : `${block.delay} updates`, staleness: staleness(now.staleness?.[block.name]),
      tick: now.tick[block.name] ?? "–", updates: now.updates[block.name] ?? "–",
      "|h|": number(norms.h), "|z|": number(norms.z), "|ω|": number(norms.omega), "|θ|": number(norms.theta), "|Δθ| of an update": number(norms.update), alignment: alignment(run.aligned.get(block.name)),
      "share of steps": percent(blockLoads(run).get(block.name) ?? NaN), "waits for": now.waiting[block.name] ?? "nothing" };
    const list = make("dl", {});
    for (const [name, value] of Object.entries(facts)) list.append(make("dt", {}, name), make("dd", {}, String(value)));
    const canvas = make("div", { class: "plot" });
    const log = run.log.filter((l) => l.text.includes(block.name) || (l.event.blocks ?? []).includes(block.name));
    box.replaceChildren(make("h3", {}, block.name), list, canvas,
      make("ul", { class: "log small" }, ...log.map((l) => make("li", {}, l.text))));
    const history = run.history.get(block.name) ?? [];
    if (history.length > 1) {
      const names = ["|h|", "|z|", "|ω|", "|θ|", "|Δθ|"];
      const data = [0, 1, 2, 3, 4, 5].map((i) => history.map((p) => (i && !(p[i] > 0) ? null : p[i])));
      plot(canvas, data, names.map((label, i) => ({ label, stroke: PALETTE[i], dash: DASHES[i], width: 2, spanGaps: true, value: (_, v) => number(v) })),
        { height: 200, logY: true, xLabel: "samples" });
    }
  }

  // -- actors, edges, log -------------------------------------------------------------------------
  const KINDS = ["step", "packing", "waiting", "stream", "other"];

  function renderActors(run) {
    const box = byId("actors");
    if (!box || !run.actors.length) return;
    const last = run.actors[run.actors.length - 1];
    const names = Object.keys(last.seconds);
    const shares = spent(run);
    byId("actors-says").textContent = names.length > MOST_STRIPS ? `the ${MOST_STRIPS} of ${names.length} that wait least` : "";
    if (names.length > MOST_STRIPS) names.sort((a, b) => (shares.get(a).waiting ?? 0) - (shares.get(b).waiting ?? 0));
    box.replaceChildren(...names.slice(0, MOST_STRIPS).map((name) => {
      const canvas = make("canvas", { role: "img" });
      const share = shares.get(name) ?? {};
      const says = `${name}: ${percent(share.step)} steps, ${percent(share.waiting ?? 0)} waiting, ${bytes(last.memory[name])}`;
      canvas.setAttribute("aria-label", says);
      canvas.title = says;
      requestAnimationFrame(() => strip(canvas, run.actors, name));
      return make("div", { class: "strip" }, make("span", {}, `${name} `, make("span", { class: "faint" },
        `${percent(share.step)} busy, ${bytes(last.memory[name])}`)), canvas);
    }));
  }

  function strip(canvas, events, name) {
    const ratio = window.devicePixelRatio || 1;
    const width = (canvas.width = Math.max(1, canvas.clientWidth * ratio)), height = (canvas.height = 34 * ratio);
    const pen = canvas.getContext("2d");
    const begin = events[0].time - (events[0].seconds[name]?.total ?? 0), end = events[events.length - 1].time;
    let before = {}, at = begin;
    for (const e of events) {
      const now = e.seconds[name];
      if (!now) continue;
      if (now.total < (before.total ?? 0)) { before = {}; at = e.time - now.total; } // a replaced actor began again
      const total = now.total - (before.total ?? 0);
      const parts = {};
      let rest = 1;
      for (const kind of KINDS.slice(0, 4)) {
        parts[kind] = Math.min(rest, total > 0 ? Math.max(0, ((now[kind] ?? 0) - (before[kind] ?? 0)) / total) : 0);
        rest -= parts[kind];
      }
      parts.other = rest;
      let y = height;
      const x = ((at - begin) / (end - begin)) * width, w = ((e.time - at) / (end - begin)) * width;
      for (const kind of KINDS) {
        pen.fillStyle = css(`--${kind}`);
        pen.fillRect(x, y - parts[kind] * height, w + 0.6, parts[kind] * height);
        y -= parts[kind] * height;
      }
      before = now; at = e.time;
    }
  }

  function renderEdges(run) {
    const box = byId("edges");
    if (!box || !run.edges.length) return;
    const rows = [...edgeRates(run)].sort((a, b) => b[1].share - a[1].share || b[1].bytes - a[1].bytes).slice(0, 200);
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...["edge", "bytes", "bytes/s", "under way", "waited", "of the time"].map((t) => make("th", {}, t)))));
    table.append(make("tbody", {}, ...rows.map(([name, r]) => make("tr", {}, ...[name, bytes(r.bytes), Number.isFinite(r.rate) ? bytes(r.rate) : "–",
      r.queued, `${number(r.waited)} s`, percent(r.share)].map((c) => make("td", {}, String(c)))))));
    box.replaceChildren(table);
  }

  function renderLog(run) {
    const box = byId("log");
    if (!box) return;
    const clock = (t) => new Date(t * 1000).toLocaleTimeString();
    box.replaceChildren(...run.log.slice(-200).reverse().map((l) => make("li", {}, `${clock(l.time)}  ${l.text}`)));
  }

  function renderStatus(run) {
    const box = byId("status");
    if (!box || !run) return;
    const p = run.progress;
    const parts = [run.title || run.level];
    if (run.finished) parts.push(LOGGED.finished(run.finished));
    else if (!p) parts.push(run.phase ? `starting (${run.phase})` : "starting");
    const now = run.finished ?? p;
    if (now) parts.push(`sample ${now.samples}${p && p.steps ? ` of ${p.steps}` : ""}`, `${number(now.seconds)} s`);
    if (p && !run.finished) parts.push(`tick ${p.tick}`);
    if (p && p.note && !run.finished) parts.push(p.note);
    box.textContent = parts.join(" · ");
    const select = byId("run");
    if (select.options.length !== runs.size || select.value !== run.key) {
      select.replaceChildren(...[...runs.values()].map((r) => make("option", { value: r.key },
        `${folders.length > 1 ? `${folders[r.folder].path}: ` : ""}${r.level}${r.seed === undefined ? "" : `, seed ${r.seed}`}`)));
      select.value = run.key;
    }
    const folder = folders[run.folder];
    const takes = Boolean(run.settings && run.settings.snapshots && run.settings.snapshots.path) || run.log.some((l) => l.kind === "snapshot");
    const open = Boolean(folder && folder.alive && folder.controls && p && !run.finished);
    if (byId("stop")) byId("stop").disabled = !open;
    if (byId("snapshot")) { byId("snapshot").disabled = !open || !takes;
      byId("snapshot").title = takes ? "" : "this run takes no snapshots (snapshots.path, --snapshots)"; }
  }

  function draw() {
    const run = runs.get(chosenRun);
    if (baked.figures.length) renderFigures();
    renderCurves();
    if (run) {
      for (const render of [renderStatus, renderNetwork, renderBlock, renderActors, renderEdges, renderLog]) render(run);
      for (const [id, there] of [["network-part", run.network], ["actors-part", run.actors.length], ["edges-part", run.edges.length]])
        if (byId(id)) byId(id).hidden = !there;
    }
    changed = false;
  }

  // -- sortable tables ----------------------------------------------------------------------------
  function sortable(table) {
    const value = (row, i) => { const text = row.cells[i].textContent; const n = parseFloat(text.replace(/[, ]/g, "").replace("−", "-")); return Number.isNaN(n) ? text : n; };
    [...table.tHead.rows[0].cells].forEach((th, i) => {
      const button = make("button", { onclick: () => {
        const up = th.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        th.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const x = value(a, i), y = value(b, i);
          const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows);
      } });
      button.textContent = th.textContent;
      th.replaceChildren(button);
    });
  }

  // -- live: events from the server, buttons ------------------------------------------------------
  const token = new URLSearchParams(location.search).get("token");
  const ask = (path, options = {}) => fetch(path, { ...options, headers: { "X-Token": token } });

  async function poll() {
    let more = false;
    try {
      const told = await (await ask("folders")).json();
      told.forEach((f, i) => { folders[i] = { from: 0, controls: false, ...folders[i], ...f }; });
      for (let i = 0; i < folders.length; i += 1) {
        const part = await (await ask(`events?folder=${i}&from=${folders[i].from}`)).json();
        folders[i].from = part.next;
        more = more || part.more;
        for (const event of part.events) take(i, event);
      }
      if (changed && !more) {
        draw();
        const run = runs.get(chosenRun);
        const advice = await (await ask(`explain?folder=${run ? run.folder : 0}&level=${encodeURIComponent(run ? run.level : "")}&seed=${run ? run.seed ?? "" : ""}`)).json();
        byId("advice").replaceChildren(...advice.map((text) => make("li", {}, text)));
        byId("advice-part").hidden = !advice.length;
      }
      byId("gone").hidden = true;
    } catch (error) { byId("gone").hidden = false; }
    setTimeout(poll, more ? 0 : 1000);
  }

  function control(action) {
    const run = runs.get(chosenRun);
    if (!run) return;
    ask(`control?folder=${run.folder}&action=${action}`, { method: "POST" }).then(async (answer) => {
      byId("asked").textContent = answer.ok ? `asked for: ${action}` : await answer.text();
    });
  }

  for (const id of ["metric", "against", "log-x", "log-y", "average"]) if (byId(id)) byId(id).addEventListener("input", renderCurves);
  if (byId("run")) byId("run").addEventListener("input", (e) => { chosenRun = e.target.value; chosenBlock = null; draw(); });
  for (const id of ["stop", "snapshot"]) if (byId(id)) byId(id).addEventListener("click", () => control(id));
  if (byId("svg")) byId("svg").addEventListener("click", () => saveSvg(curves, "curves"));
  for (const table of document.querySelectorAll("table.sortable")) sortable(table);
  let resized = null;
  window.addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(draw, 150); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  if (byId("data")) {
    for (const event of baked.events) take(0, event);
    draw();
  } else poll();
  window.hamdist = { runs, folders, take, draw, saveSvg }; // for tests, and for the curious
})();
