// SPDX-License-Identifier: Apache-2.0
// Draws the charts of the report (charts.py says what each holds), in the colours of report.css.
"use strict";

const drawings = JSON.parse(document.getElementById("drawings").textContent);

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? Math.ceil(Math.log10(size + 1)) : 4 });
}

function escape(text) {
  return String(text).replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

function axis(name, more) {
  return {
    name,
    nameLocation: "middle",
    nameGap: 26,
    nameTextStyle: { color: colour("soft") },
    axisLine: { lineStyle: { color: colour("rule") } },
    axisTick: { show: false },
    axisLabel: { color: colour("soft"), hideOverlap: true },
    splitLine: { lineStyle: { color: colour("rule"), width: 0.6 } },
    ...more,
  };
}

function frame(drawing, more) {
  return {
    animation: false,
    backgroundColor: "transparent",
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: colour("ink") },
    aria: { enabled: true, label: { description: drawing.summary } },
    grid: { left: 8, right: 16, top: 12, bottom: 8, containLabel: true },
    ...more,
    tooltip: {
      confine: true,
      backgroundColor: colour("panel"),
      borderColor: colour("rule"),
      textStyle: { color: colour("ink"), fontSize: 13 },
      ...more.tooltip,
    },
  };
}

const DASHES = ["solid", [6, 3], [2, 2], [8, 3, 2, 3]];

function drawLines(drawing) {
  const names = [...new Set(drawing.series.map((line) => line.name.split(", ")[0]))];
  const series = [];
  for (const line of drawing.series) {
    const place = names.indexOf(line.name.split(", ")[0]);
    const shade = colour(`c${place % 4}`);
    if (line.band.length) {
      // The range between lowest and highest: an invisible line and what is stacked on it.
      const band = { type: "line", stack: line.name, stackStrategy: "all", symbol: "none", silent: true, lineStyle: { opacity: 0 } };
      series.push({ ...band, name: "low", data: line.band.map(([x, low]) => [x, low]) });
      series.push({
        ...band,
        name: "range",
        data: line.band.map(([x, low, high]) => [x, high - low]),
        areaStyle: { color: shade, opacity: 0.18 },
      });
    }
    const isFaint = line.style === "faint";
    series.push({
      type: "line",
      name: line.name,
      data: line.points,
      symbol: line.style === "marks" || line.points.length === 1 ? "circle" : "none",
      symbolSize: 6,
      color: shade,
      emphasis: { disabled: true },
      lineStyle: { width: isFaint ? 1 : 1.8, opacity: isFaint ? 0.45 : 1, type: isFaint ? "solid" : DASHES[place % 4] },
      z: isFaint ? 2 : 3,
    });
  }
  const named = drawing.series.map((line) => line.name);
  const hasLegend = names.length > 1;
  return frame(drawing, {
    grid: { left: 8, right: 20, top: hasLegend ? 36 : 12, bottom: 26, containLabel: true },
    legend: { show: hasLegend, data: names, left: 0, top: 0, selectedMode: false, itemWidth: 22, itemHeight: 8, itemStyle: { opacity: 0 }, textStyle: { color: colour("ink") } },
    tooltip: {
      trigger: "axis",
      formatter: (items) => {
        const shown = items.filter((item) => named.includes(item.seriesName));
        const head = shown.length ? `${escape(drawing.x)}: ${number(shown[0].value[0])}` : "";
        return [head, ...shown.map((item) => `${escape(item.seriesName)}: <b>${number(item.value[1])}</b> ${escape(drawing.unit)}`)].join("<br>");
      },
    },
    xAxis: axis(drawing.x, { type: "value", min: 0, max: "dataMax", splitLine: { show: false }, axisLabel: { color: colour("soft"), hideOverlap: true, formatter: number, showMaxLabel: drawing.x === "step" } }),
    yAxis: axis("", { type: drawing.is_log ? "log" : "value", scale: !drawing.from_zero, max: drawing.unit === "%" ? 100 : undefined, axisLabel: { color: colour("soft"), formatter: number } }),
    series,
  });
}

// Whole steps of 1, 2 or 5 for a few labels, and which columns of a heat map carry one.
function chooseTicks(columns) {
  const span = columns[columns.length - 1] / 6;
  const power = 10 ** Math.floor(Math.log10(span));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= span) * power;
  return columns.map((x, place) => {
    const tick = Math.floor(x / step);
    return place > 0 && tick > Math.floor(columns[place - 1] / step) ? number(tick * step) : "";
  });
}

function drawHeat(drawing) {
  const ticks = chooseTicks(drawing.columns);
  const isShare = drawing.unit === "%";
  const [lowest, highest] = isShare ? [0, 100] : drawing.range;
  return frame(drawing, {
    grid: { left: 8, right: 8, top: 8, bottom: 56, containLabel: true },
    tooltip: {
      formatter: ({ value: [column, row, shown] }) =>
        `${escape(drawing.rows[row])}<br>${number(drawing.columns[column])} ${escape(drawing.x)}<br><b>${number(shown)}</b> ${escape(drawing.unit)}`,
    },
    xAxis: axis(drawing.x, { type: "category", data: drawing.columns, splitLine: { show: false }, axisLabel: { color: colour("soft"), interval: 0, formatter: (text, place) => ticks[place] } }),
    yAxis: axis("", { type: "category", inverse: true, data: drawing.rows, axisLine: { show: false }, splitLine: { show: false }, axisLabel: { color: colour("soft"), fontSize: 11, hideOverlap: true } }),
    visualMap: {
      min: lowest,
      max: highest > lowest ? highest : lowest + 1,
      orient: "horizontal",
      left: "center",
      bottom: 0,
      itemWidth: 10,
      itemHeight: 140,
      calculable: false,
      hoverLink: false,
      text: [`${number(highest)} ${drawing.unit}`, `${number(lowest)}`],
      textStyle: { color: colour("soft") },
      inRange: { color: [0, 1, 2, 3, 4].map((step) => colour(`heat${step}`)) },
    },
    series: [{ type: "heatmap", data: drawing.cells, emphasis: { disabled: true } }],
  });
}

function drawBars(drawing) {
  return frame(drawing, {
    grid: { left: 8, right: 16, top: drawing.series.length > 1 ? 36 : 12, bottom: 26, containLabel: true },
    legend: { show: drawing.series.length > 1, left: 0, top: 0, selectedMode: false, itemWidth: 14, itemHeight: 10, textStyle: { color: colour("ink") } },
    tooltip: {
      trigger: "axis",
      axisPointer: { type: "shadow" },
      formatter: (items) =>
        [`${escape(items[0].name)} ${escape(drawing.x)}`, ...items.map((item) => `${escape(item.seriesName)}: <b>${number(item.value)}</b> ${escape(drawing.unit)}`)].join("<br>"),
    },
    xAxis: axis(drawing.x, { type: "category", data: drawing.labels }),
    yAxis: axis("", { type: "value" }),
    series: drawing.series.map(({ name, values }, place) => ({ type: "bar", name, data: values, color: colour(`c${place % 4}`), barGap: "0%", barCategoryGap: "15%", emphasis: { disabled: true } })),
  });
}

function drawTimeline(drawing) {
  return frame(drawing, {
    grid: { left: 8, right: 20, top: 20, bottom: 26, containLabel: true },
    tooltip: { formatter: (item) => escape(drawing.bars[item.dataIndex][3]) },
    xAxis: axis(drawing.x, { type: "value", min: 0, max: drawing.end || 1, axisLabel: { color: colour("soft"), hideOverlap: true, formatter: number, showMaxLabel: false } }),
    yAxis: axis("", { type: "category", inverse: true, data: drawing.rows, axisLine: { show: false }, axisLabel: { color: colour("ink"), interval: 0 } }),
    series: [
      {
        type: "custom",
        encode: { x: [1, 2], y: 0 },
        data: drawing.bars.map(([row, start, end]) => [row, start, end]),
        renderItem: (params, api) => {
          const [left, middle] = api.coord([api.value(1), api.value(0)]);
          const width = Math.max(2, api.coord([api.value(2), 0])[0] - left);
          const height = Math.min(16, api.size([0, 1])[1] * 0.6);
          return { type: "rect", shape: { x: left, y: middle - height / 2, width, height, r: 2 }, style: { fill: colour("c0") } };
        },
        markLine: {
          silent: true,
          symbol: "none",
          label: { position: "start", formatter: ({ name }) => name, color: colour("soft") },
          lineStyle: { color: colour("c1"), type: "dashed" },
          data: drawing.marks.map(([x, name]) => ({ xAxis: x, name })),
        },
      },
    ],
  });
}

const DRAW = { lines: drawLines, heat: drawHeat, bars: drawBars, timeline: drawTimeline };

function draw() {
  for (const element of document.querySelectorAll(".chart")) {
    echarts.getInstanceByDom(element)?.dispose();
    const drawing = drawings[element.dataset.chart];
    echarts.init(element, null, { renderer: "svg" }).setOption(DRAW[drawing.kind](drawing));
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
addEventListener("beforeprint", () => {
  document.documentElement.dataset.print = ""; // as wide and as light as paper
  draw();
});
addEventListener("afterprint", () => {
  delete document.documentElement.dataset.print;
  draw();
});
new ResizeObserver(() => {
  if ("print" in document.documentElement.dataset) return;
  for (const element of document.querySelectorAll(".chart")) echarts.getInstanceByDom(element)?.resize();
}).observe(document.getElementById("main"));
