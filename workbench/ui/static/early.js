// In the page's head, before anything else: what is picked while `picker.js` is still on its way is not lost.
addEventListener('click', (event) => {
  const part = event.target.closest?.('[data-pick]');
  if (part && !part.disabled && !part.closest('[data-picker]')) window.adatsqMissed = part.dataset.pick;
}, true);
