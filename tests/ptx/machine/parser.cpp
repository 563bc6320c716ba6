// From the text of a module to a Program.
#include <algorithm>
#include <cstring>

#include "program.h"

namespace ptx {
namespace {

using std::string;
using std::vector;

string trimmed(const string& s) {
  const size_t begin = s.find_first_not_of(" \t\r\n"), end = s.find_last_not_of(" \t\r\n");
  return begin == string::npos ? "" : s.substr(begin, end - begin + 1);
}

// At a character that is not within brackets.
vector<string> split(const string& s, char by) {
  vector<string> parts;
  string part;
  int depth = 0;
  for (const char c : s) {
    if (strchr("{[(", c)) ++depth;
    if (strchr("}])", c)) --depth;
    if (c == by && depth == 0)
      parts.push_back(trimmed(part)), part.clear();
    else
      part += c;
  }
  if (!trimmed(part).empty()) parts.push_back(trimmed(part));
  return parts;
}

vector<string> words(const string& s) {
  vector<string> result;
  for (size_t i = 0; i < s.size();) {
    const size_t begin = s.find_first_not_of(" \t\r\n", i);
    if (begin == string::npos) break;
    i = std::min(s.find_first_of(" \t\r\n", begin), s.size());
    result.push_back(s.substr(begin, i - begin));
  }
  return result;
}

string without_comments(const string& text) {
  string result;
  result.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i)
    if (text.compare(i, 2, "//") == 0)
      i = std::min(text.find('\n', i), text.size()) - 1;
    else if (text.compare(i, 2, "/*") == 0)
      i = text.find("*/", i) + 1;
    else
      result += text[i];
  return result;
}

[[noreturn]] void refuse(const string& what) { throw Error("PTX that the machine does not know: " + what); }

u64 number(const string& s) {
  const bool hexadecimal_float = s.size() > 2 && s[0] == '0' && strchr("fFdD", s[1]);
  if (hexadecimal_float) return strtoull(s.c_str() + 2, nullptr, 16);
  if (s[0] == '-') return (u64) - (s64)strtoull(s.c_str() + 1, nullptr, 0);
  return strtoull(s.c_str(), nullptr, 0);
}
bool is_number(const string& s) { return isdigit((u8)s[0]) || (s.size() > 1 && s[0] == '-'); }

// ".param .align 8 .b8 name[16]": all that declarations share.
struct Declaration {
  explicit Declaration(const string& text) {
    const vector<string> all = words(text);
    for (size_t i = 0; i < all.size(); ++i) {
      const string& w = all[i];
      if (w == ".align") {
        // of a parameter that is a pointer: of what it points to
        (is_pointer ? pointee_alignment : alignment) = atoi(all.at(++i).c_str());
      } else if (w[0] == '.') {
        if (const Type type = type_named(w.substr(1)); type != Type::kNone) element = bytes_of(type);
        is_pointer |= w == ".ptr";
        is_shared |= w == ".shared";
        is_global |= w == ".global" || w == ".const";
      } else {
        name += w;
      }
    }
    if (const size_t bracket = name.find('['); bracket != string::npos) {
      count = atoi(name.c_str() + bracket + 1);
      is_unbounded = count == 0;
      name.resize(bracket);
    }
    alignment = std::max(alignment, element);
  }
  int bytes() const { return element * count; }

  string name;
  int element = 4, count = 1, alignment = 1, pointee_alignment = 1;
  bool is_pointer = false, is_shared = false, is_global = false, is_unbounded = false;
};

int aligned(int offset, int alignment) { return (offset + alignment - 1) / alignment * alignment; }

class Parser {
 public:
  explicit Parser(const string& text) : text_(without_comments(text)) {
    while (skip_space(), at_ < text_.size()) {
      if (looking_at(".file")) {
        const vector<string> w = words(until("\n"));
        if (w.size() >= 3) program_.files[atoi(w[1].c_str())] = w[2];
      } else if (looking_at(".version") || looking_at(".target") || looking_at(".address_size")) {
        until("\n");
      } else if (looking_at(".section")) {
        until("}"), ++at_;
      } else {
        declaration();
      }
    }
    program_.shared_bytes = aligned(program_.shared_bytes, 128);
    for (const auto& [kernel, index] : dynamic_)
      std::fill_n(&kernel->constants[index * kLanes], kLanes, program_.shared_bytes);
  }

  Program take() { return std::move(program_); }

 private:
  // ------------------------------------------------------------------------------------------------------- the module

  void declaration() {
    const string head = until(";{(");
    if (head.find(".entry") != string::npos) return kernel(words(head).back());
    if (head.find(".func") != string::npos) refuse("a function, " + trimmed(head));
    if (head.find('.') == string::npos) refuse(head);
    variable(head + until(";"));  // values in braces and all
    ++at_;
  }

  void variable(const string& text) {
    const Declaration d(text.substr(0, text.find('=')));
    if (d.is_shared) {
      if (d.is_unbounded) {
        program_.dynamic = d.name;
        return;
      }
      const int offset = aligned(program_.shared_bytes, d.alignment);
      program_.shared[d.name] = offset;
      program_.shared_bytes = offset + d.bytes();
    } else if (d.is_global) {
      constexpr int kAlignment = 256;
      program_.memory.emplace_back(new char[d.bytes() + kAlignment]());
      const u64 begin = (u64)program_.memory.back().get(), address = (begin + kAlignment - 1) / kAlignment * kAlignment;
      program_.globals[d.name] = {address, d.bytes()};
      const size_t brace = text.find('{');
      if (brace == string::npos) return;
      char* p = (char*)address;
      for (const string& value : split(text.substr(brace + 1, text.rfind('}') - brace - 1), ',')) {
        const u64 x = number(value);
        memcpy(p, &x, d.element);
        p += d.element;
      }
    } else {
      refuse(trimmed(text));
    }
  }

  void kernel(const string& name) {
    kernel_ = &program_.kernels[name];
    kernel_->name = name;
    scopes_.assign(1, {});
    labels_.clear(), jumps_.clear(), table_jumps_.clear(), tables_.clear(), constants_.clear();
    ++at_;
    for (const string& text : split(until(")"), ',')) {
      const Declaration d(text);
      const int offset = aligned(kernel_->parameter_bytes, d.alignment);
      kernel_->by_name[d.name] = {offset, d.bytes()};
      kernel_->parameters.push_back({offset, d.bytes()});
      kernel_->parameter_bytes = offset + d.bytes();
    }
    until("{"), ++at_;  // between parameters and body: directives such as .reqntid
    body();
  }

  void body() {
    while (!scopes_.empty()) {
      skip_space();
      if (at_ >= text_.size()) refuse("the end of the text within " + kernel_->name);
      const char c = text_[at_];
      if (c == '{') {
        scopes_.emplace_back(), ++at_;
      } else if (c == '}') {
        scopes_.pop_back(), ++at_;
      } else if (c == ';') {
        ++at_;
      } else if (looking_at(".loc\t") || looking_at(".loc ")) {
        const vector<string> w = words(until("\n"));
        file_ = atoi(w.at(1).c_str()), line_ = atoi(w.at(2).c_str());
      } else if (c == '.') {
        directive(until(";"));
      } else if (!label()) {
        instruction(trimmed(statement()));
      }
    }
    Instruction end;
    end.op = Op::kRet, end.text = "(the end)";
    kernel_->code.push_back(end);
    const auto place = [&](const string& label) {
      if (!labels_.count(label)) refuse("no label " + label);
      return labels_[label];
    };
    for (const auto& [i, label] : jumps_) kernel_->code[i].target = place(label);
    for (const auto& [i, label] : table_jumps_) {
      kernel_->code[i].target = (int)kernel_->tables.size();
      vector<int>& table = kernel_->tables.emplace_back();
      for (const string& target : tables_.at(label)) table.push_back(place(target));
    }
  }

  bool label() {
    size_t end = at_;
    while (end < text_.size() && (isalnum((u8)text_[end]) || strchr("_$%", text_[end]))) ++end;
    const size_t colon = text_.find_first_not_of(" \t", end);
    if (colon == string::npos || text_[colon] != ':' || text_[colon + 1] == ':') return false;
    const string name = text_.substr(at_, end - at_);
    at_ = colon + 1;
    skip_space();
    if (looking_at(".branchtargets"))
      tables_[name] = split(until(";").substr(strlen(".branchtargets")), ',');
    else
      labels_[name] = (int)kernel_->code.size();
    return true;
  }

  void directive(const string& text) {
    const vector<string> w = words(text);
    if (w[0] == ".shared") return variable(text);
    if (w[0] == ".pragma") return;
    if (w[0] != ".reg") refuse(text);
    const bool predicates = w[1] == ".pred";
    for (string name : split(text.substr(text.find(w[1]) + w[1].size()), ',')) {
      const auto add = [&](const string& n) {
        scopes_.back()[n] = predicates ? ~kernel_->num_predicates++ : kernel_->num_registers++;
      };
      const size_t bracket = name.find('<');
      if (bracket == string::npos)
        add(name);
      else
        for (int i = 0; i < atoi(name.c_str() + bracket + 1); ++i) add(name.substr(0, bracket) + std::to_string(i));
    }
  }

  // ---------------------------------------------------------------------------------------------------- an instruction

  void instruction(const string& text) {
    string rest = text, guard;
    if (rest[0] == '@') {
      const size_t end = rest.find_first_of(" \t\n");
      guard = rest.substr(1, end - 1), rest = trimmed(rest.substr(end));
    }
    const size_t end = rest.find_first_of(" \t\n");
    const string name = rest.substr(0, end);
    const vector<string> operands = end == string::npos ? vector<string>{} : split(rest.substr(end), ',');

    const vector<Form> forms = forms_of(name);
    if (forms.empty()) refuse("instruction " + name + " in `" + text + "`");
    const Form* chosen = nullptr;
    for (const Form& form : forms) {
      size_t most = 0, least = 0;
      for (const char* c = form.operands; *c; ++c)
        if (*c == '?')
          --least;
        else
          ++most, ++least;
      if (operands.size() >= least && operands.size() <= most) chosen = &form;
    }
    if (!chosen) refuse("the number of operands of `" + text + "`");
    Instruction i = chosen->prototype;
    std::fill(i.results, std::end(i.results), kNoOperand);
    i.text = text, i.file = file_, i.line = line_;
    std::replace_if(i.text.begin(), i.text.end(), [](char c) { return isspace((u8)c); }, ' ');
    if (!guard.empty()) i.guard = predicate(guard, &i.guard_negated);
    const char* kind = chosen->operands;
    for (const string& operand : operands) {
      operand_of(i, *kind++, operand);
      if (*kind == '?') ++kind;
    }
    check(i);
    kernel_->code.push_back(i);
  }

  void operand_of(Instruction& i, char kind, const string& s) {
    const size_t bar = s.find('|');
    const string first = trimmed(s.substr(0, bar)), second = bar == string::npos ? "" : trimmed(s.substr(bar + 1));
    switch (kind) {
      case 'd':
        return add_result(i, s);
      case 'e':
        add_result(i, first);
        if (!second.empty()) i.predicate = predicate(second);
        return;
      case 'D':
        for (const string& one : elements(s)) add_result(i, one);
        return;
      case 'p':
        i.predicate = predicate(s);
        return;
      case 'q':
        i.predicate = predicate(first);
        if (!second.empty()) i.other_predicate = predicate(second);
        return;
      case 'P': {
        if (is_number(s)) return add_operand(i, s);  // mov.pred p, 1
        int& source = i.source == -1 ? i.source : i.other_source;
        bool negated = false;
        source = predicate(s, &negated);
        if (negated && &source == &i.other_source) refuse("a negated second predicate in `" + i.text + "`");
        i.source_negated |= negated;
        return;
      }
      case 's':
        return add_operand(i, s);
      case 'S':
        for (const string& one : elements(s)) add_operand(i, one);
        return;
      case 'A':
        return add_operand(i, bracketed(i, s));
      case 'a': {
        const string inside = bracketed(i, s), base = trimmed(inside.substr(0, inside.find('+')));
        if (const size_t plus = inside.find('+'); plus != string::npos)
          i.offset = (s64)number(trimmed(inside.substr(plus + 1)));
        if (i.space == Space::kParam && kernel_->by_name.count(base))
          i.offset += kernel_->by_name[base].offset;
        else
          i.base = value(base);
        return;
      }
      case 'i':
        if (!is_number(s) || number(s) != 0) refuse("a barrier other than number 0 in `" + i.text + "`");
        return;
      case 'L':
        jumps_.push_back({(int)kernel_->code.size(), s});
        return;
      case 'T':
        table_jumps_.push_back({(int)kernel_->code.size(), s});
        return;
      case '_':
        if (s != "_") refuse("a result of `" + i.text + "`");
        return;
      default:
        return;  // a hint
    }
  }

  // What moves several registers is packing and unpacking; loads and stores have as many as their vector is long.
  void check(Instruction& i) {
    const bool vector = i.num_results > 1 || i.num_operands > 1;
    if (i.op == Op::kMov && vector) i.op = i.num_results > 1 ? Op::kUnpack : Op::kPack;
    if ((i.op == Op::kUnpack || i.op == Op::kPack) && i.num_results > 1 && i.num_operands > 1) refuse(i.text);
    if (i.op == Op::kMov && bytes_of(i.type) > 8) refuse(i.text);
    if (i.op == Op::kLd && i.num_results != i.vector) refuse("vector of another length: " + i.text);
    if (i.op == Op::kSt && i.num_operands != i.vector) refuse("vector of another length: " + i.text);
    if ((i.op == Op::kLdmatrix || i.op == Op::kStmatrix)) {
      i.space = Space::kShared;
      const int count = i.text[i.text.find(".x") + 2] - '0';
      if (std::max(i.num_results, i.num_operands) != count) refuse("vector of another length: " + i.text);
    }
  }

  static vector<string> elements(const string& s) {
    return s[0] == '{' ? split(s.substr(1, s.size() - 2), ',') : vector<string>{s};
  }
  static string bracketed(const Instruction& i, const string& s) {
    if (s[0] != '[' || s.back() != ']') refuse("an address of `" + i.text + "`");
    return trimmed(s.substr(1, s.size() - 2));
  }
  void add_result(Instruction& i, const string& s) {
    if (i.num_results == 8) refuse("as many results as in `" + i.text + "`");
    i.results[i.num_results++] = s == "_" ? kNoOperand : value(s);
  }
  void add_operand(Instruction& i, const string& s) {
    if (i.num_operands == kMaxOperands) refuse("as many operands as in `" + i.text + "`");
    i.operands[i.num_operands++] = value(s);
  }

  bool find(const string& name, int& index) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (const auto found = scope->find(name); found != scope->end()) return index = found->second, true;
    return false;
  }

  int predicate(string name, bool* negated = nullptr) {
    if (negated && name[0] == '!') *negated = true, name = name.substr(1);
    if (name == "_") return -1;
    int index;
    if (!find(name, index) || index >= 0) refuse("predicate " + name);
    return ~index;
  }

  int value(const string& s) {
    int index;
    if (find(s, index)) {
      if (index < 0) refuse("predicate " + s + " as a value");
      return index;
    }
    if (s[0] == '%') {
      const auto [special, is_new] = kernel_->special.try_emplace(s, kernel_->num_registers);
      if (is_new) ++kernel_->num_registers;
      return special->second;
    }
    if (is_number(s)) return constant(number(s));
    if (kernel_->by_name.count(s)) return constant(kernel_->by_name[s].offset);
    if (program_.shared.count(s)) return constant(program_.shared[s]);
    if (program_.globals.count(s)) return constant(program_.globals[s].address);
    if (s == "WARP_SZ") return constant(kLanes);
    if (s != program_.dynamic) refuse("operand " + s);
    dynamic_.push_back({kernel_, new_constant(0)});
    return ~dynamic_.back().second;
  }

  int constant(u64 value) {
    const auto [known, is_new] = constants_.try_emplace(value, 0);
    if (is_new) known->second = new_constant(value);
    return ~known->second;
  }
  int new_constant(u64 value) {
    kernel_->constants.insert(kernel_->constants.end(), kLanes, value);
    return (int)(kernel_->constants.size() / kLanes) - 1;
  }

  // ---------------------------------------------------------------------------------------------------------- the text

  void skip_space() {
    while (at_ < text_.size() && isspace((u8)text_[at_])) ++at_;
  }
  bool looking_at(const char* word) const { return text_.compare(at_, strlen(word), word) == 0; }
  string until(const char* stops) {
    const size_t end = std::min(text_.find_first_of(stops, at_), text_.size());
    const string result = text_.substr(at_, end - at_);
    at_ = end;
    return result;
  }
  // Up to the semicolon; braces belong to vectors.
  string statement() {
    const size_t begin = at_;
    for (int depth = 0; at_ < text_.size() && (text_[at_] != ';' || depth > 0); ++at_)
      depth += (text_[at_] == '{') - (text_[at_] == '}');
    return text_.substr(begin, at_++ - begin);
  }

  const string text_;
  size_t at_ = 0;
  Program program_;
  Kernel* kernel_ = nullptr;
  int file_ = 0, line_ = 0;
  vector<std::unordered_map<string, int>> scopes_;  // registers, and predicates as complements
  std::map<string, int> labels_;
  std::map<string, vector<string>> tables_;
  vector<std::pair<int, string>> jumps_, table_jumps_;  // instructions whose targets are to come
  std::unordered_map<u64, int> constants_;
  vector<std::pair<Kernel*, int>> dynamic_;  // constants that are where dynamic shared memory begins
};

}  // namespace

Program parse(const string& text) { return Parser(text).take(); }

}  // namespace ptx
