// /openapi.json as a page.
import { make } from "./view.js";

function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.items) return `array of ${kind(schema.items)}`;
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  return schema.type ?? "anything";
}

function fields(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, each]) => {
    const needed = schema.required?.includes(name) ? " (required)" : "";
    const meaning = [kind(each) + needed, each.description].filter(Boolean).join(". ");
    return make("tr", {}, make("td", {}, make("code", {}, name)), make("td", {}, meaning));
  });
  return make("table", {}, make("tbody", {}, ...rows));
}

const found = await (await fetch("/openapi.json")).json();
for (const [path, operations] of Object.entries(found.paths)) {
  for (const [method, operation] of Object.entries(operations)) {
    const title = make("summary", {}, make("code", {}, `${method.toUpperCase()} ${path}`), ` ${operation.summary}`);
    const reference = operation.requestBody?.content["application/json"].schema.$ref;
    const body = reference
      ? fields(found.components.schemas[reference.split("/").at(-1)])
      : make("p", { className: "faint" }, "It takes no body.");
    document.getElementById("routes").append(make("details", {}, title, body));
  }
}
