/** An error with a text for the user: what went wrong, and what the user can do. */
export class PlainError extends Error {
  constructor(title, detail = "", { needsKey = false } = {}) {
    super(title);
    Object.assign(this, { title, detail, needsKey });
  }
}
