"use strict";
// The charts, and one filter for each store's map and lists. Names reach the page as text only:
// through textContent, or escaped for plotly, which understands a little HTML.
(() => {
  const MAX_COLOURED = 10;
  const MAX_ROWS = 200;
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon", "hexagon"];
  const SIGNS = ["●", "■", "◆", "▲", "▼", "✚", "✖", "★", "⬟", "⬢"];
  const stores = JSON.parse(document.getElementById("chart-data").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = new Set();
  const touch = matchMedia("(pointer: coarse)").matches;
  const states = new Map();

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const counted = (number) => number.toLocaleString("en");

  // ---- plotly

  const unpack = async (id) => {
    const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };

  const loadPlotly = async () => {
    const script = document.createElement("script");
    script.textContent = await unpack("plotly");
    document.head.append(script);
  };

  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const wrapped = (name) => {
    const letters = [...name];
    const shown = letters.length > 160 ? [...letters.slice(0, 100), "…", ...letters.slice(-50)] : letters;
    const lines = [];
    for (let at = 0; at < shown.length; at += 44) lines.push(escaped(shown.slice(at, at + 44).join("")));
    return lines.join("<br>");
  };

  const layout = (x, y) => ({
    margin: { l: 52, r: 8, t: 8, b: 44 },
    autosize: true,
    showlegend: false,
    dragmode: touch ? false : "zoom",
    hovermode: "closest",
    bargap: 0,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("muted") },
    hoverlabel: { align: "left", bgcolor: colour("text"), bordercolor: colour("text"), font: { color: colour("page"), size: 13 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("accent") },
    xaxis: axis(x),
    yaxis: axis(y),
  });

  const axis = (title) => ({
    title: { text: title, standoff: 8 },
    gridcolor: colour("line"),
    zerolinecolor: colour("line"),
    linecolor: colour("line"),
    automargin: true,
    fixedrange: touch,
  });

  const config = {
    displaylogo: false,
    responsive: true,
    displayModeBar: touch ? false : "hover",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]], // none that sends anything
  };

  // ---- histograms

  const histogram = (bars, unit, counts) => {
    const centres = bars.counts.map((_, i) => (bars.edges[i] + bars.edges[i + 1]) / 2);
    const short = (value) => Number(value.toPrecision(4)).toString();
    return {
      traces: [{
        type: "bar",
        x: centres,
        y: bars.counts,
        width: bars.counts.map((_, i) => bars.edges[i + 1] - bars.edges[i]),
        text: bars.counts.map((_, i) => `${short(bars.edges[i])} to ${short(bars.edges[i + 1])}`),
        textposition: "none",
        hovertemplate: "%{text}: %{y:,}<extra></extra>",
        marker: { color: colour("accent"), opacity: 0.75 },
      }],
      layout: layout(unit, counts),
    };
  };

  // ---- the map

  const percent = (share) => `${(100 * share).toFixed(1)} % of the variance`;

  const mapFigure = (number) => {
    const { map } = stores[number];
    const state = states.get(number);
    const { coloured } = state;
    const groups = new Map([["faint", []], ["other", []], ...coloured.map((name) => [name, []])]);
    map.names.forEach((_, i) => {
      if (!state.active[i]) groups.get("faint").push(i);
      else groups.get(coloured.includes(map.classes[i]) ? map.classes[i] : "other").push(i);
    });
    const size = map.names.length > 1500 ? 5 : 7;
    const traces = [...groups].map(([group, points]) => {
      const place = placeOf(number, group);
      const marker = place >= 0
        ? { color: colour(`c${place}`), symbol: SYMBOLS[place], size: size + 1, opacity: 0.8 }
        : { color: colour("neutral"), symbol: "circle", size: group === "faint" ? size - 1 : size, opacity: group === "faint" ? 0.18 : 0.55 };
      return {
        type: "scatter",
        mode: "markers",
        x: points.map((i) => map.x[i]),
        y: points.map((i) => map.y[i]),
        customdata: points,
        text: group === "faint" ? undefined : points.map((i) => wrapped(map.names[i])),
        hoverinfo: group === "faint" ? "skip" : undefined,
        hovertemplate: group === "faint" ? undefined : "%{text}<extra></extra>",
        marker: { ...marker, line: { width: 0 } },
      };
    });
    const [first, second] = map.shares;
    const figure = layout(`component 1 (${percent(first)})`, `component 2 (${percent(second)})`);
    // The same view while the filter changes.
    figure.uirevision = "map";
    const spread = (values) => {
      const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
      const room = (high - low || Math.abs(high) || 1) * 0.04;
      return [low - room, high + room];
    };
    figure.xaxis.range = spread(map.x);
    figure.yaxis.range = spread(map.y);
    return { traces, layout: figure };
  };

  const drawLegend = (number) => {
    const legend = section(number).querySelector(".colours");
    if (!legend) return;
    const { coloured, chosen } = states.get(number);
    const { classes, map } = stores[number];
    const items = coloured.map((name) => {
      const place = placeOf(number, name);
      return legendItem(SIGNS[place], colour(`c${place}`), classes[name]);
    });
    const others = new Set(map.classes.filter((name) => !coloured.includes(name) && (!chosen.size || chosen.has(name)))).size;
    if (others) items.push(legendItem("●", colour("neutral"), `${counted(others)} other ${others === 1 ? "class" : "classes"}; choose some to colour them`));
    legend.replaceChildren(...items);
  };

  const legendItem = (sign, paint, name) => {
    const item = document.createElement("li");
    const swatch = document.createElement("b");
    swatch.textContent = sign;
    swatch.style.color = paint;
    swatch.setAttribute("aria-hidden", "true");
    const text = document.createElement("span");
    text.className = "name";
    text.textContent = name;
    item.append(swatch, text);
    return item;
  };

  // Few classes keep their colours while some are chosen; of many the chosen get them in turn.
  const placeOf = (number, name) => {
    const place = states.get(number).coloured.indexOf(name);
    return place >= 0 && stores[number].classes.length <= MAX_COLOURED ? name : place;
  };

  const section = (number) => document.querySelector(`section[data-store="${number}"]`);

  const draw = (plot) => {
    const number = Number(plot.dataset.store);
    const kind = plot.dataset.chart;
    const figure = kind === "map"
      ? mapFigure(number)
      : histogram(stores[number][kind], plot.dataset.unit, kind === "norms" ? "embeddings" : "numbers");
    const isNew = !drawn.has(plot);
    drawn.add(plot);
    const done = Plotly.react(plot, figure.traces, figure.layout, config);
    if (isNew && kind === "map") plot.on("plotly_click", (event) => showClip(number, event.points[0].customdata));
    return done;
  };

  // The file of a point that was clicked: its path, and a player, which finds it on the machine that has it.
  const showClip = (number, point) => {
    const panel = section(number).querySelector(".clip");
    const path = stores[number].map.paths[point];
    const player = panel.querySelector("audio");
    panel.hidden = false;
    panel.querySelector("strong").textContent = stores[number].map.names[point];
    panel.querySelector("code").textContent = path;
    player.hidden = !path.startsWith("/");
    if (player.hidden) player.removeAttribute("src");
    else player.src = `file://${path.split("/").map(encodeURIComponent).join("/")}`;
  };

  const redraw = () => {
    states.forEach((_, number) => drawLegend(number));
    drawn.forEach(draw);
  };

  // ---- the filter

  const updateState = (number) => {
    const state = states.get(number);
    const { map, classes } = stores[number];
    const query = state.query.toLowerCase();
    const fits = (name) => !state.chosen.size || state.chosen.has(name);
    const all = state.chosen.size ? [...state.chosen] : classes.map((_, i) => i);
    const onMap = map ? new Set(map.classes) : new Set();
    state.coloured = all.filter((name) => onMap.has(name)).slice(0, MAX_COLOURED);
    if (map) state.active = map.names.map((name, i) => fits(map.classes[i]) && name.toLowerCase().includes(query));
    const rows = [...section(number).querySelectorAll("table.filtered tbody tr")];
    let shown = 0;
    rows.forEach((row) => {
      const of = row.dataset.classes.split(" ").map(Number);
      const visible = of.some(fits) && row.textContent.toLowerCase().includes(query);
      row.hidden = !visible;
      shown += visible;
    });
    // A list that holds what is looked for opens.
    if (query || state.chosen.size) rows.filter((row) => !row.hidden).forEach((row) => { (row.closest(".part") ?? {}).open = true; });
    const points = map ? `${counted(state.active.filter(Boolean).length)} of ${counted(map.names.length)} points in the map, ` : "";
    section(number).querySelector(".found").textContent = `${points}${counted(shown)} of ${counted(rows.length)} rows in the lists.`;
    const names = [...state.chosen].map((i) => classes[i]);
    section(number).querySelector(".chosen").textContent = names.length ? names.join(", ") : `all ${counted(classes.length)}`;
  };

  const refresh = (number) => {
    updateState(number);
    drawLegend(number);
    plots.filter((plot) => drawn.has(plot) && plot.dataset.chart === "map" && Number(plot.dataset.store) === number).forEach(draw);
    fillPoints(number);
  };

  const fillPoints = (number) => {
    const details = section(number).querySelector(".point-table");
    if (!details || !details.open) return;
    const { map } = stores[number];
    const active = map.names.map((_, i) => i).filter((i) => states.get(number).active[i]);
    details.querySelector(".shown").textContent = active.length > MAX_ROWS
      ? `The first ${MAX_ROWS} of ${counted(active.length)}; the filter above finds the others.`
      : `${counted(active.length)} points.`;
    details.querySelector("tbody").replaceChildren(...active.slice(0, MAX_ROWS).map((i) => {
      const row = document.createElement("tr");
      [map.names[i], map.x[i].toPrecision(4), map.y[i].toPrecision(4)].forEach((value, column) => {
        const cell = document.createElement(column ? "td" : "th");
        if (!column) cell.scope = "row";
        const text = document.createElement("span");
        text.className = "name";
        text.textContent = value;
        cell.append(text);
        row.append(cell);
      });
      return row;
    }));
  };

  const addFilter = (bar) => {
    const number = Number(bar.closest("section").dataset.store);
    const state = { query: "", chosen: new Set(), coloured: [], active: [] };
    const { classes } = stores[number];
    states.set(number, state);
    bar.hidden = false;
    let timer = 0;
    const later = () => {
      clearTimeout(timer);
      timer = setTimeout(() => refresh(number), 120);
    };
    bar.querySelector(".query").addEventListener("input", (event) => {
      state.query = event.target.value;
      later();
    });
    const items = classes.map((name, i) => {
      const item = document.createElement("li");
      const label = document.createElement("label");
      const box = document.createElement("input");
      const text = document.createElement("span");
      box.type = "checkbox";
      text.textContent = name;
      box.addEventListener("change", () => {
        if (box.checked) state.chosen.add(i);
        else state.chosen.delete(i);
        later();
      });
      label.append(box, text);
      item.append(label);
      return item;
    });
    bar.querySelector(".choices ul").replaceChildren(...items);
    bar.querySelector(".narrow").hidden = classes.length <= 12;
    bar.querySelector(".class-query").addEventListener("input", (event) => {
      const query = event.target.value.toLowerCase();
      items.forEach((item, i) => { item.hidden = !classes[i].toLowerCase().includes(query); });
    });
    bar.querySelector(".clear").addEventListener("click", () => {
      state.chosen.clear();
      items.forEach((item) => { item.querySelector("input").checked = false; });
      later();
    });
    const chooser = bar.querySelector(".chooser");
    chooser.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      chooser.open = false;
      chooser.querySelector("summary").focus();
    });
    document.addEventListener("click", (event) => {
      if (!chooser.contains(event.target)) chooser.open = false;
    });
    section(number).querySelector(".point-table")?.addEventListener("toggle", () => fillPoints(number));
    updateState(number);
    drawLegend(number);
  };

  // ---- when to draw

  const printed = (on) => {
    document.documentElement.dataset.theme = on ? "print" : "";
    // Charts are printed, and drawn only where they are shown; long lists stay folded.
    document.querySelectorAll(".part:has(.plot)").forEach((part) => {
      if (on) part.dataset.open = part.open;
      part.open = on || part.dataset.open === "true";
    });
    if (!window.Plotly) return;
    states.forEach((_, number) => drawLegend(number));
    plots.forEach((plot) => {
      // The sheet is narrower than most windows: A4 less its margins, in CSS pixels.
      if (on) plot.style.width = plot.dataset.chart === "map" ? "660px" : "310px";
      else plot.style.width = "";
      draw(plot);
      Plotly.Plots.resize(plot);
    });
  };

  const start = async () => {
    document.getElementById("no-script").remove();
    document.querySelectorAll(".filter").forEach(addFilter);
    try {
      await loadPlotly();
    } catch {
      plots.forEach((plot) => {
        plot.style.height = "auto";
        plot.textContent = "This browser can't unpack the charts; the tables hold the same.";
      });
      return;
    }
    const watch = new IntersectionObserver((entries) => {
      entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
        watch.unobserve(entry.target);
        draw(entry.target);
      });
    }, { rootMargin: "400px" });
    plots.forEach((plot) => watch.observe(plot));
    // The first stores' without waiting for a scroll: a picture of the whole page has them.
    const idle = window.requestIdleCallback ?? setTimeout;
    const drawNext = () => {
      const plot = plots.slice(0, 12).find((each) => !drawn.has(each) && each.checkVisibility());
      if (!plot) return;
      draw(plot);
      idle(drawNext);
    };
    idle(drawNext);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    addEventListener("beforeprint", () => printed(true));
    addEventListener("afterprint", () => printed(false));
    document.documentElement.dataset.ready = "";
  };

  start();
})();
