// HTML whose parts can be picked. A script of its own: it must not wait for plotly, which is large.
(() => {
  // HTML made by the server in which everything with data-pick can be clicked, or chosen with the keyboard.
  window.adatsqPicker = (element, watch, send) => {
    const pick = (target) => {
      const found = target.closest('[data-pick]');
      if (!found || found.disabled) return;
      if (found.hasAttribute('aria-pressed')) {  // marked at once; the server's picture follows
        for (const other of element.querySelectorAll('[data-pick][aria-pressed=true]')) other.setAttribute('aria-pressed', 'false');
        found.setAttribute('aria-pressed', 'true');
      }
      send(JSON.parse(found.dataset.pick));
    };
    let held = null;
    element.dataset.picker = '1';
    element.addEventListener('click', (event) => {
      const copy = event.target.closest('[data-copy]');
      if (!copy) return pick(event.target);
      const address = new URL(copy.dataset.copy, window.location.href).href;
      const said = (words) => { copy.textContent = words; };
      navigator.clipboard ? navigator.clipboard.writeText(address).then(() => said('Copied'), () => said('Copy the address of the link beside'))
        : said('Copy the address of the link beside');
    });
    element.addEventListener('focusin', (event) => { held = event.target.dataset?.pick ?? null; });
    element.addEventListener('focusout', (event) => { if (event.relatedTarget) held = null; });
    element.addEventListener('keydown', (event) => {
      const here = event.target.closest('[data-pick]');
      if (!here) return;
      const all = [...(here.closest('[data-group]') || element).querySelectorAll('[data-pick]')];
      const step = {ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[event.key];
      if (step) {
        event.preventDefault();
        all[Math.min(all.length - 1, Math.max(0, all.indexOf(here) + step))].focus();
      } else if ((event.key === 'Enter' || event.key === ' ') && here.tagName !== 'BUTTON') {
        event.preventDefault();
        pick(here);
      }
    });
    watch('value', () => {  // the picture was drawn anew: whoever had the focus keeps it
      if (held === null || !document.activeElement || document.activeElement !== document.body) return;
      const again = [...element.querySelectorAll('[data-pick]')].find((one) => one.dataset.pick === held);
      if (again) again.focus({preventScroll: true});
    });
    const missed = window.adatsqMissed && [...element.querySelectorAll('[data-pick]')].find((one) => one.dataset.pick === window.adatsqMissed);
    if (missed) { window.adatsqMissed = null; pick(missed); }  // pressed before this script had come
  };
})();
