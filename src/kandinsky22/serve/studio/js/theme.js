// Sets the stored theme before the first paint. Without a stored one the system's preference counts.
(() => {
  try {
    const theme = localStorage.getItem("k22.theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage may be switched off; the system's preference then counts.
  }
})();
