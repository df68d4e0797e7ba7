/**
 * The store of this tab, which survives a reload.
 *
 * A browser that blocks cookies forbids the store, too. Then the page works, but forgets everything with a reload.
 */
export const store = tabStore();

function tabStore() {
  try {
    return window.sessionStorage;
  } catch (error) {
    if (error.name !== "SecurityError") throw error;
    const values = new Map();
    return { getItem: key => values.get(key) ?? null, setItem: (key, value) => values.set(key, value) };
  }
}
