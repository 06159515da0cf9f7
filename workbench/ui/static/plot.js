// A Plotly figure that keeps its node and zoom across updates, reports clicks, and lets a rectangle of cells be painted.
(() => {
  const CONFIG = {displaylogo: false, responsive: false, scrollZoom: false, showTips: false,
                  modeBarButtonsToRemove: ['sendChartToCloud', 'sendDataToCloud', 'lasso2d', 'select2d', 'autoScale2d']};

  const NARROW = 520;  // pixels under which a figure is laid out as for a phone
  const REST_MS = 200;  // a cell that the arrow keys have left at once is not asked about
  const NOTE_PX = 6.8, TITLE_PX = 6;  // a letter of a note, and of a colour bar's title

  function broken(text, letters) {  // into lines of so many letters, at spaces
    const lines = [''];
    for (const word of String(text).split(' ')) {
      const last = lines.length - 1;
      if (lines[last] && lines[last].length + word.length >= letters) lines.push(word);
      else lines[last] += (lines[last] && ' ') + word;
    }
    return lines.join('<br>');
  }

  const DIGIT_PX = 20;  // a share of a phone's width per step below which a cell has no room for its number: names take a third
  const digits = (pitch) => Math.min(9, 0.4 * pitch);  // size of a cell's number

  // The figure as it fits the width: what `meta.narrow` says on a phone, long lines broken.
  function fitted(figure, width) {
    const layout = {...figure.layout}, narrow = width < NARROW;
    if (layout.annotations) layout.annotations = layout.annotations.map(
      (note) => (note.name === 'note' ? {...note, text: broken(note.text, width / NOTE_PX)} : note));
    if (!narrow) return {data: figure.data, layout};
    for (const [axis, more] of Object.entries(layout.meta?.narrow || {})) layout[axis] = {...layout[axis], ...more};
    const data = figure.data.map((wide) => {
      const pitch = width / wide.x.length;
      const small = wide.texttemplate && wide.x.length > 1 ? (pitch < DIGIT_PX ? {texttemplate: ''} : {textfont: {size: digits(pitch)}}) : {};
      const trace = {...wide, ...small};
      const bar = trace.colorbar;
      if (!bar) return trace;
      const ends = bar.tickvals && bar.ticktext?.[0].length > 3 ? [0, bar.tickvals.length - 1] : null;  // long numbers: the ends alone
      const ticks = ends ? {tickvals: ends.map((i) => bar.tickvals[i]), ticktext: ends.map((i) => bar.ticktext[i])} : {};
      return {...trace, colorbar: {...bar, ...ticks, len: 1, title: {...bar.title, text: broken(bar.title.text, (width * 0.5) / TITLE_PX)}}};
    });
    return {data, layout};
  }

  function painted(layout, element, node) {
    const css = getComputedStyle(element);
    const ink = css.getPropertyValue('--body-text-color').trim() || '#222';
    const rule = css.getPropertyValue('--border-color-primary').trim() || '#ddd';
    const ground = css.getPropertyValue('--background-fill-primary').trim() || '#fff';
    const out = {...layout, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
                 font: {color: ink, family: css.fontFamily, size: 12}, autosize: true, height: node.clientHeight,
                 hoverlabel: {bgcolor: ground, bordercolor: rule, font: {color: ink}, align: 'left'},
                 modebar: {bgcolor: 'rgba(0,0,0,0)', color: rule, activecolor: ink}};
    for (const key of Object.keys(out)) {
      if (/^[xy]axis/.test(key)) out[key] = {gridcolor: rule, zerolinecolor: rule, linecolor: rule, ...out[key]};
    }
    return out;
  }

  function payload(event) {
    const point = event.points && event.points[0];
    if (!point) return null;
    const index = Array.isArray(point.pointIndex) ? point.pointIndex : [point.pointNumber, -1];
    const custom = Array.isArray(point.customdata) ? point.customdata : [];
    return {row: index[0], column: index[1], trace: String(point.data?.name ?? ''),
            plan: String(custom[0] ?? '')};
  }

  // Which cell of a heatmap is under the pointer: {row, column, part}; part "weights" is the narrow column at the left.
  function cellAt(node, event) {
    const full = node._fullLayout, box = node.getBoundingClientRect();
    const y = full.yaxis.p2d ? full.yaxis.p2c(event.clientY - box.top - full.yaxis._offset) : -1;
    const along = (axis) => Math.round(axis.p2c(event.clientX - box.left - axis._offset));
    const inWeights = full.xaxis2 && event.clientX - box.left < full.xaxis2._offset + full.xaxis2._length;
    return {row: Math.round(y), column: inWeights ? 0 : along(full.xaxis), part: inWeights ? 'weights' : 'steps'};
  }

  // The clicked cell, framed at once; the server's picture follows.
  function framed(node, point) {
    const [row, column] = point.pointIndex, axis = (point.data.xaxis || 'x');
    const shapes = [{type: 'rect', xref: axis, yref: 'y', x0: column - 0.5, x1: column + 0.5, y0: row - 0.5, y1: row + 0.5,
                     line: {color: '#ff4d4d', width: 3}}];
    window.Plotly.relayout(node, {shapes});
  }

  function allowPainting(node, send) {
    let from = null;
    const mark = (to) => {
      const axis = from.part === 'weights' ? 'x2' : 'x';
      const kept = (node.layout.shapes || []).filter((shape) => shape.name !== 'brush');
      const span = (a, b) => [Math.min(a, b) - 0.5, Math.max(a, b) + 0.5];
      const [x0, x1] = span(from.column, to.column), [y0, y1] = span(from.row, to.row);
      window.Plotly.relayout(node, {shapes: [...kept, {name: 'brush', type: 'rect', xref: axis, yref: 'y', x0, x1, y0, y1,
                                                       line: {color: '#ffffff', width: 2}, fillcolor: 'rgba(255,255,255,0.35)'}]});
    };
    const same = (to) => ({...to, column: from.part === to.part ? to.column : (from.part === 'weights' ? 0 : Math.max(0, to.column))});
    node.addEventListener('pointerdown', (event) => {
      if (!node.layout?.meta?.brush || event.button || !event.target.closest('.nsewdrag')) return;
      event.preventDefault(); event.stopPropagation();
      from = cellAt(node, event);
      node.setPointerCapture(event.pointerId);
      mark(from);
    }, true);
    for (const kind of ['mousedown', 'touchstart']) {
      node.addEventListener(kind, (event) => {
        if (node.layout?.meta?.brush && event.target.closest('.nsewdrag')) event.stopPropagation();
      }, true);
    }
    node.addEventListener('pointermove', (event) => { if (from) mark(same(cellAt(node, event))); });
    node.addEventListener('pointerup', (event) => {
      if (!from) return;
      const to = same(cellAt(node, event)), sorted = (a, b) => (a < b ? [a, b] : [b, a]);
      const [row, last_row] = sorted(from.row, to.row), [column, last_column] = sorted(from.column, to.column);
      send({part: from.part, row, last_row, column, last_column});
      from = null;
    });
    node.addEventListener('pointercancel', () => { from = null; });
  }

  // Arrow keys move over a heatmap's cells, and a cell that is rested on is chosen; with a brush, Enter or space paints it.
  function allowKeys(node, send) {
    const MOVES = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
    const within = (at, low, high) => Math.max(low, Math.min(high, at));
    let resting = 0;
    node.addEventListener('keydown', (event) => {
      const maps = (node.data || []).filter((trace) => trace.type === 'heatmap'), map = maps[maps.length - 1];
      const move = MOVES[event.key], press = event.key === 'Enter' || event.key === ' ', brush = node.layout?.meta?.brush;
      if (!map || !(move || press) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const weights = maps.length > 1, at = node.cursor || shownFrame(node) || {row: 0, column: 0};
      const [down, right] = move || [0, 0];
      const row = within(at.row + down, 0, map.y.length - 1), column = within(at.column + right, weights && brush ? -1 : 0, map.x.length - 1);
      node.cursor = {row, column};
      frameCursor(node);
      clearTimeout(resting);
      if (brush) {
        if (press) send.paint({part: column < 0 ? 'weights' : 'steps', row, last_row: row, column: Math.max(0, column),
                               last_column: Math.max(0, column)});
      } else resting = setTimeout(() => send.click({row, column, trace: map.name || '', plan: ''}), press ? 0 : REST_MS);
    });
    node.addEventListener('blur', () => { node.cursor = null; });
  }

  function shownFrame(node) {
    const frame = (node.layout?.shapes || []).find((shape) => shape.type === 'rect' && shape.x1 - shape.x0 === 1 && shape.y1 - shape.y0 === 1);
    return frame && {row: frame.y0 + 0.5, column: frame.x0 + 0.5};
  }

  function frameCursor(node) {
    const {row, column} = node.cursor;
    framed(node, {pointIndex: [row, Math.max(0, column)], data: {xaxis: column < 0 ? 'x2' : 'x'}});
  }

  window.adatsqPlot = (element, props, watch, send) => {
    const P = window.Plotly, node = element.querySelector('.plot');
    let wired = false, missed = false, width = node.clientWidth;
    const usual = node.style.height;

    function draw() {
      const figure = props.value;
      if (!P || !figure || !figure.data) return;
      missed = !node.clientWidth;  // on a hidden screen: drawn when it is shown
      if (missed) return;
      const meta = figure.layout.meta || {}, width = node.clientWidth;
      const height = (width < NARROW && meta.narrow_height) || meta.height;
      node.style.height = height ? `${height}px` : usual;
      const map = figure.data.some((trace) => trace.type === 'heatmap');
      node.tabIndex = map ? 0 : -1;
      node.setAttribute('role', map ? 'application' : 'img');
      if (map) node.setAttribute('aria-description', meta.brush ? 'arrow keys move, Enter paints' : 'arrow keys move and choose a cell');
      const {data, layout} = fitted(figure, width);
      P.react(node, data, painted(layout, element, node), CONFIG).then(() => {
        if (node.cursor && meta.brush) frameCursor(node);
        if (wired) return;
        wired = true;
        node.on('plotly_click', (event) => {
          const sent = payload(event);
          if (!sent) return;
          send.click(sent);
          if (event.points[0].data?.type === 'heatmap' && !node.layout.meta?.brush) framed(node, event.points[0]);
        });
        if (send.paint) allowPainting(node, send.paint);
        allowKeys(node, send);
      });
    }

    let due = false;
    function soon() {  // after what is quick to show, numbers and tables, has been painted; each plot in a turn of its own
      if (due) return;
      due = true;
      requestAnimationFrame(() => setTimeout(() => { due = false; draw(); }));
    }

    watch('value', soon);
    draw();
    new ResizeObserver(() => {
      const stale = node.clientWidth && (missed || node.clientWidth !== width);
      if (!stale) return;
      width = node.clientWidth;
      draw();  // takes the new width by itself
    }).observe(node);
    new MutationObserver(draw).observe(document.body, {attributes: true, attributeFilter: ['class']});
  };
})();
