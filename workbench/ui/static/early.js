// In the page's head, before anything else: what is picked while `picker.js` is still on its way is not lost.
addEventListener('click', (event) => {
  const part = event.target.closest?.('[data-pick]');
  if (part && !part.disabled && !part.closest('[data-picker]')) window.adatsqMissed = part.dataset.pick;
}, true);
// A file above the limit is not sent, and is refused in its screen's line; gradio would put a box over the page.
addEventListener('change', (event) => {
  const input = event.target, panel = input.type === 'file' && input.closest('[role=tabpanel]');
  const large = panel && [...input.files].find((file) => file.size > window.adatsqUploadMB * 1e6);
  if (!large) return;
  event.stopImmediatePropagation();
  input.value = '';
  const line = Object.assign(document.createElement('p'), {className: 'notice error', role: 'alert',
    textContent: `${large.name} has ${(large.size / 1e6).toFixed(1)} MB; a file may have at most ${window.adatsqUploadMB} MB here`});
  panel.querySelector('[id^=notice-]').after(line);
  setTimeout(() => addEventListener('click', () => line.remove(), {once: true}));
}, true);
