// Two images of the same size, compared pixel by pixel on one canvas: slider, flip, side by side, difference, blind test.
// Zoom and pan are shared by both, so that nothing ever shifts; images are drawn without smoothing.
(() => {
  const MODES = [['slider', 'Slider'], ['flip', 'Flip'], ['beside', 'Side by side'], ['difference', 'Difference'], ['blind', 'Blind test']];
  const HELP = {
    slider: 'Drag, or use the arrow keys, to move the border.', flip: 'Hold the space bar, or press on the image, to see the quantized one.',
    beside: 'Both images share zoom and pan: wheel or + and −, drag to move.', difference: '|float − quantized| × gain, clipped at white.',
    blind: 'Which one looks better? You are told nothing until you have answered.',
  };
  const IMAGES = new Map();  // by address; a few dozen at most stay

  function fetched(url) {
    if (!IMAGES.has(url)) {
      if (IMAGES.size > 120) IMAGES.delete(IMAGES.keys().next().value);
      const image = new Image();
      image.src = url;
      IMAGES.set(url, image.decode().then(() => image));
    }
    return IMAGES.get(url);
  }

  function pixels(image) {
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const context = canvas.getContext('2d', {willReadFrequently: true, colorSpace: 'srgb'});
    context.drawImage(image, 0, 0);
    return {canvas, context, data: context.getImageData(0, 0, canvas.width, canvas.height)};
  }

  function difference(left, right, gain) {
    const out = pixels(left), other = pixels(right).data.data, data = out.data.data;
    for (let i = 0; i < data.length; i += 4) {
      for (let c = 0; c < 3; c += 1) data[i + c] = Math.min(255, Math.round(Math.abs(data[i + c] - other[i + c]) * gain));
      data[i + 3] = 255;
    }
    out.context.putImageData(out.data, 0, 0);
    return out.canvas;
  }

  window.adatsqViewer = (element, props, watch, send) => {
    const find = (name) => element.querySelector(name);
    const canvas = find('.stage canvas'), context = canvas.getContext('2d');
    const state = {mode: 'slider', split: 0.5, flipped: false, zoom: 1, x: 0.5, y: 0.5, pair: [], gap: null, gapKey: '', drag: null};
    let latest = 0;

    const width = () => canvas.clientWidth, height = () => canvas.clientHeight;
    const halves = () => (state.mode === 'beside' || state.mode === 'blind' ? 2 : 1);
    const image = () => state.pair[0];

    function frame(half) {  // where the image is in one half of the stage, in CSS pixels
      const room = width() / halves() - (halves() - 1) * 4;
      const fit = Math.min(room / image().naturalWidth, height() / image().naturalHeight);
      const scale = (fit >= 2 ? Math.floor(fit) : fit) * state.zoom;
      const left = half * (width() / halves() + 4);
      return {left, room, scale, x: left + room / 2 - state.x * image().naturalWidth * scale,
              y: height() / 2 - state.y * image().naturalHeight * scale, w: image().naturalWidth * scale, h: image().naturalHeight * scale};
    }

    function label(text, x, y, align = 'left') {
      context.font = `600 12px ${getComputedStyle(element).fontFamily}`;
      const wide = context.measureText(text).width + 12;
      const left = align === 'left' ? x : x - wide;
      context.fillStyle = 'rgba(15,23,42,.72)';
      context.fillRect(left, y, wide, 20);
      context.fillStyle = '#fff';
      context.fillText(text, left + 6, y + 14);
    }

    function put(picture, where) {
      context.save();
      context.beginPath(); context.rect(where.left, 0, where.room, height()); context.clip();
      context.imageSmoothingEnabled = where.scale < 1;
      context.drawImage(picture, where.x, where.y, where.w, where.h);
      context.restore();
    }

    function paint() {
      const inside = (place) => (state.zoom === 1 ? 0.5 : Math.min(1, Math.max(0, place)));  // never out of sight
      state.x = inside(state.x); state.y = inside(state.y);
      const ratio = window.devicePixelRatio || 1;
      if (!width()) return;
      canvas.width = Math.round(width() * ratio); canvas.height = Math.round(height() * ratio);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      if (state.pair.length < 2) return;
      const [left, right] = state.pair, value = props.value, where = frame(0);
      const names = value.labels;
      if (state.mode === 'difference') {
        const key = `${left.src}|${right.src}|${value.gain}`;
        if (state.gapKey !== key) { state.gap = difference(left, right, value.gain); state.gapKey = key; }
        put(state.gap, where);
        label(`|difference| × ${value.gain}`, 8, 8);
      } else if (halves() === 2) {
        put(left, where); put(right, frame(1));
        label(names[0], where.left + 8, 8); label(names[1], frame(1).left + 8, 8);
      } else if (state.mode === 'flip') {
        put(state.flipped ? right : left, where);
        label(names[state.flipped ? 1 : 0], 8, 8);
      } else {
        const border = where.x + state.split * where.w;
        put(left, where);
        context.save();
        context.beginPath(); context.rect(border, 0, width(), height()); context.clip();
        put(right, where);
        context.restore();
        const top = Math.max(0, where.y), tall = Math.min(height(), where.y + where.h) - top;
        context.fillStyle = 'rgba(15,23,42,.55)'; context.fillRect(border - 2, top, 4, tall);
        context.fillStyle = '#fff'; context.fillRect(border - 1, top, 2, tall);
        label(names[0], 8, 8); label(names[1], width() - 8, 8, 'right');
      }
    }

    function text(selector, words) { const node = find(selector); if (node.textContent !== words) node.textContent = words; }

    function controls() {
      const value = props.value;
      for (const button of element.querySelectorAll('.modes button')) button.setAttribute('aria-pressed', button.dataset.mode === state.mode);
      find('.viewer').classList.toggle('nothing', !value.left);
      find('.gain').hidden = state.mode !== 'difference';
      find('.vote').hidden = state.mode !== 'blind' || !value.left;
      find('.scrub').hidden = state.mode === 'blind' || !value.steps;
      if (document.activeElement !== find('.gain input')) find('.gain input').value = value.gain;
      text('.gain output', `× ${value.gain}`);
      const scrub = find('.scrub input');
      scrub.max = value.steps;
      if (document.activeElement !== scrub) scrub.value = value.at ?? value.steps;
      text('.scrub output', value.step_words || '');
      text('.help', value.left ? HELP[state.mode] : '');
      text('.caption', value.caption || '');
      text('.tally', value.tally || '');
      text('.nothing-yet', value.nothing || '');
      canvas.setAttribute('aria-label', value.left ? `${value.labels[0]} and ${value.labels[1]}: ${value.caption}` : 'no images yet');
    }

    function update() {
      const value = props.value;
      if (!value) return;
      if (value.mode) state.mode = value.mode;
      controls();
      const mine = ++latest;
      if (!value.left) { state.pair = []; return paint(); }
      Promise.all([fetched(value.left), fetched(value.right)]).then((pair) => {
        if (mine !== latest) return;  // another pair has been asked for since
        state.pair = pair;
        element.querySelector('.viewer').dataset.shown = `${value.left} ${value.right}`;
        paint();
      }, () => text('.caption', 'the images could not be fetched; reload the page'));
    }

    function choose(mode) {
      state.mode = mode;
      controls(); paint();
      send({what: 'mode', mode});
    }

    const modes = find('.modes');
    for (const [mode, name] of MODES) {
      const button = document.createElement('button');
      button.type = 'button'; button.dataset.mode = mode; button.textContent = name;
      button.addEventListener('click', () => { choose(mode); if (mode === 'flip') canvas.focus({preventScroll: true}); });
      modes.append(button);
    }
    find('.reset').addEventListener('click', () => { Object.assign(state, {zoom: 1, x: 0.5, y: 0.5, split: 0.5}); paint(); });
    find('.gain input').addEventListener('input', (event) => {
      props.value.gain = Number(event.target.value);
      text('.gain output', `× ${props.value.gain}`);
      paint();
    });
    find('.gain input').addEventListener('change', (event) => send({what: 'gain', gain: Number(event.target.value)}));
    let waiting = null, resting = false;
    function ask(step) {  // at once, but at most four times a second, and always the last one
      if (resting) { waiting = step; return; }
      resting = true;
      send({what: 'step', step});
      setTimeout(() => { const last = waiting; waiting = null; resting = false; if (last !== null) ask(last); }, 250);
    }
    find('.scrub input').addEventListener('input', (event) => {
      const step = Number(event.target.value);
      text('.scrub output', step >= props.value.steps ? 'final image' : `after step ${step} …`);
      ask(step);
    });
    for (const button of element.querySelectorAll('.vote button')) {
      button.addEventListener('click', () => send({what: 'vote', choice: button.dataset.choice}));
    }

    const spot = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    function zoom(factor, x, y) {
      if (!image()) return;
      const half = halves() === 2 && x > width() / 2 ? 1 : 0, before = frame(half);
      const u = (x - before.x) / before.w, v = (y - before.y) / before.h;
      state.zoom = Math.min(64, Math.max(1, state.zoom * factor));
      if (state.zoom === 1) { state.x = 0.5; state.y = 0.5; return paint(); }
      const after = frame(half);  // the pixel under the pointer stays there
      state.x += u - (x - after.x) / after.w; state.y += v - (y - after.y) / after.h;
      paint();
    }
    canvas.addEventListener('wheel', (event) => { if (!event.ctrlKey && !event.shiftKey && state.zoom === 1 && event.deltaY > 0) return;
      event.preventDefault(); zoom(event.deltaY < 0 ? 1.25 : 0.8, ...spot(event)); }, {passive: false});
    canvas.addEventListener('pointerdown', (event) => {
      if (!image() || event.button) return;
      canvas.setPointerCapture(event.pointerId);
      const [x, y] = spot(event), where = frame(0);
      const near = state.mode === 'slider' && (state.zoom === 1 || Math.abs(x - where.x - state.split * where.w) < 16);
      state.drag = near ? 'split' : 'pan';
      state.last = [x, y];
      if (state.mode === 'flip') { state.flipped = true; paint(); }
      if (near) { state.split = Math.min(1, Math.max(0, (x - where.x) / where.w)); paint(); }
    });
    canvas.addEventListener('pointermove', (event) => {
      if (!state.drag || !image()) return;
      const [x, y] = spot(event), where = frame(0);
      if (state.drag === 'split') state.split = Math.min(1, Math.max(0, (x - where.x) / where.w));
      else if (state.zoom > 1) { state.x -= (x - state.last[0]) / where.w; state.y -= (y - state.last[1]) / where.h; }
      state.last = [x, y];
      paint();
    });
    for (const kind of ['pointerup', 'pointercancel']) canvas.addEventListener(kind, () => { state.drag = null; state.flipped = false; paint(); });
    canvas.addEventListener('keydown', (event) => {
      const key = event.key;
      if (state.mode === 'flip' && (key === ' ' || key === 'f')) { event.preventDefault(); if (!state.flipped) { state.flipped = true; paint(); } }
      else if (key === '+' || key === '=') zoom(1.25, width() / 4, height() / 2);
      else if (key === '-') zoom(0.8, width() / 4, height() / 2);
      else if (key === '0') find('.reset').click();
      else if (key >= '1' && key <= '5') choose(MODES[Number(key) - 1][0]);
      else if (key.startsWith('Arrow')) {
        event.preventDefault();
        const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[key];
        if (state.mode === 'slider' && move[0]) state.split = Math.min(1, Math.max(0, state.split + 0.02 * move[0]));
        else { state.x += (0.1 * move[0]) / state.zoom; state.y += (0.1 * move[1]) / state.zoom; }
        paint();
      }
    });
    canvas.addEventListener('keyup', (event) => { if (event.key === ' ' || event.key === 'f') { state.flipped = false; paint(); } });
    canvas.addEventListener('blur', () => { state.flipped = false; paint(); });

    watch('value', update);
    update();
    new ResizeObserver(paint).observe(canvas);
    element.querySelector('.viewer').adatsq = state;
  };
})();
